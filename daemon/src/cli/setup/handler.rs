//! The runtime handler in containerd's configuration, by which pods come: what is written for it,
//! and whether containerd takes that as it is meant. Pure.
//!
//! It is the node's default handler with another program. A file of its own says so, in the schema
//! version of the main one: containerd 2.0 and 2.1 lose settings where versions are mixed.

use std::path::{Path, PathBuf};

use pageferry_containerd::RUNTIME;
use pageferry_oci::INSTALLED;
use toml::{Table, Value};

/// What it is called, in RuntimeClasses too.
pub const HANDLER: &str = "pageferry";

/// What containerd passes on to its program.
const ANNOTATIONS: &str = "pageferry.dev/*";

/// What containerd calls what serves Kubernetes, by the version of the schema.
const PLUGINS: [(i64, &str); 2] = [
    (2, "io.containerd.grpc.v1.cri"),
    (3, "io.containerd.cri.v1.runtime"),
];

/// The oldest schema that a containerd prints which says to its programs what pods they are of.
const DUMP_MIN: i64 = 3;

/// The file that is written, and the folder of it that is imported where none is.
const FILE: &str = "pageferry.toml";
const FOLDER: &str = "conf.d";

/// What the main file gets if it imports nothing.
const IMPORTED: &str = "# By `pageferry setup kubernetes`:";

/// What is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The file with the handler, and its text.
    pub drop_in: (PathBuf, String),
    /// The main file's new text, if that does not import the other one yet.
    pub main: Option<String>,
}

/// Why nothing is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// A text is none of that language.
    #[error("{of} cannot be read: {why}")]
    Text {
        /// Whose.
        of: String,
        /// Why.
        why: String,
    },
    /// containerd is too old.
    #[error(
        "containerd prints its configuration by version {0}: 2.0 or newer is needed, which says \
         to a program what pod it is started for"
    )]
    Old(i64),
    /// The main file has a schema of which nothing is known.
    #[error("{} has version {version}: only 2 and 3 are written", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// What it says; 1 is what it means if it says nothing.
        version: i64,
    },
    /// It imports others, and no folder.
    #[error(
        "{} imports {imports:?}, of which none is a folder's *.toml: add \
         '/etc/containerd/conf.d/*.toml'", path.display()
    )]
    Imports {
        /// The file.
        path: PathBuf,
        /// What it says.
        imports: Vec<String>,
    },
    /// The default handler is none that the program stands in for.
    #[error("containerd's default runtime {name} {what}, and pageferry-oci stands for runc alone")]
    Default {
        /// What it is called.
        name: String,
        /// What is odd about it.
        what: String,
    },
    /// There is such a handler already, and another one.
    #[error(
        "containerd has a runtime handler {HANDLER} already, which {0}: remove that from its \
         configuration first"
    )]
    Taken(String),
    /// containerd does not read what was written as it was meant.
    #[error("containerd reads {what} otherwise with it: nothing was changed")]
    Misread {
        /// The first setting.
        what: String,
    },
}

/// A configuration, as `containerd config dump` prints it.
#[derive(Clone, Debug, PartialEq)]
pub struct Dump(Table);

impl Dump {
    /// Reads it.
    pub fn parse(text: &str) -> Result<Self, Unfit> {
        let table: Table = text.parse().map_err(|error: toml::de::Error| Unfit::Text {
            of: "what `containerd config dump` prints".to_owned(),
            why: error.to_string(),
        })?;
        match version(&table) {
            old if old < DUMP_MIN => Err(Unfit::Old(old)),
            _ => Ok(Self(table)),
        }
    }

    fn runtime(&self) -> Option<&Table> {
        let (_, plugin) = PLUGINS[1];
        self.0.get("plugins")?.get(plugin)?.as_table()
    }

    fn containerd(&self) -> Option<&Value> {
        self.runtime()?.get("containerd")
    }

    fn handler(&self, name: &str) -> Option<&Table> {
        self.containerd()?.get("runtimes")?.get(name)?.as_table()
    }

    /// Whether pods can come by its handler.
    pub fn has_handler(&self) -> bool {
        self.handler(HANDLER).is_some_and(|has| odd(has).is_none())
    }

    /// Folders of networks: of their configurations, and of their programs.
    pub fn networks(&self) -> (PathBuf, Vec<PathBuf>) {
        let cni = self.runtime().and_then(|runtime| runtime.get("cni"));
        let text = |name: &str| cni?.get(name)?.as_str().filter(|text| !text.is_empty());
        let folders = cni.and_then(|cni| cni.get("bin_dirs")?.as_array());
        let folders = folders.into_iter().flatten().filter_map(Value::as_str);
        let mut programs: Vec<PathBuf> = folders.chain(text("bin_dir")).map(Into::into).collect();
        if programs.is_empty() {
            programs.push("/opt/cni/bin".into());
        }
        let configurations = text("conf_dir").unwrap_or("/etc/cni/net.d");
        (configurations.into(), programs)
    }

    /// Fails unless `after` is this with the handler, and with nothing else.
    pub fn check_after(&self, after: &Self) -> Result<(), Unfit> {
        if let Some(what) = after.handler(HANDLER).map_or(Some("is not there"), odd) {
            let what = format!("the handler {HANDLER}, which {what},");
            return Err(Unfit::Misread { what });
        }
        match difference(&self.without(), &after.without(), "") {
            None => Ok(()),
            Some(what) => Err(Unfit::Misread { what }),
        }
    }

    /// Fails unless this is `before` without the handler.
    pub fn check_gone(&self, before: &Self) -> Result<(), Unfit> {
        let what = match self.handler(HANDLER) {
            Some(_) => Some(format!("the handler {HANDLER}, which is there still,")),
            None => difference(&before.without(), &self.without(), ""),
        };
        what.map_or(Ok(()), |what| Err(Unfit::Misread { what }))
    }

    /// All but the handler, and who imports it.
    fn without(&self) -> Table {
        let mut table = self.0.clone();
        table.remove("imports");
        let (_, plugin) = PLUGINS[1];
        let mut at = table.get_mut("plugins");
        for name in [plugin, "containerd", "runtimes"] {
            at = at.and_then(|value| value.get_mut(name));
        }
        if let Some(runtimes) = at.and_then(Value::as_table_mut) {
            runtimes.remove(HANDLER);
        }
        table
    }

    /// What is to be written beside the main file at `path`, which has this text if it is there;
    /// nothing if the handler is there already.
    pub fn plan(&self, path: &Path, main: Option<&str>) -> Result<Option<Written>, Unfit> {
        if let Some(has) = self.handler(HANDLER) {
            return odd(has).map_or(Ok(None), |what| Err(Unfit::Taken(what.to_owned())));
        }
        let table: Table =
            main.unwrap_or("version = 3")
                .parse()
                .map_err(|error: toml::de::Error| Unfit::Text {
                    of: path.display().to_string(),
                    why: error.to_string(),
                })?;
        let version = version(&table);
        let plugin = PLUGINS.iter().find(|(of, _)| *of == version);
        let (_, plugin) = *plugin.ok_or_else(|| Unfit::Schema {
            path: path.to_owned(),
            version,
        })?;
        let handler = self.written()?;
        let nested = ["runtimes", "containerd", plugin, "plugins"];
        let inner = Table::from_iter([(HANDLER.to_owned(), Value::Table(handler))]);
        let mut all = nested.into_iter().fold(inner, |inner, name| {
            Table::from_iter([(name.to_owned(), Value::Table(inner))])
        });
        all.insert("version".to_owned(), Value::Integer(version));
        let (folder, main) = self.imported(path, (&table, main), version)?;
        let head = "# By `pageferry setup kubernetes`, which takes it away with --remove.\n";
        Ok(Some(Written {
            drop_in: (folder.join(FILE), format!("{head}{all}")),
            main,
        }))
    }

    /// The default handler with the other program.
    fn written(&self) -> Result<Table, Unfit> {
        let containerd = self.containerd();
        let name = containerd.and_then(|has| has.get("default_runtime_name")?.as_str());
        let name = name.unwrap_or("runc");
        let unfit = |what: &str| Unfit::Default {
            name: name.to_owned(),
            what: what.to_owned(),
        };
        let default = self.handler(name).ok_or_else(|| unfit("is not there"))?;
        let mut handler = default.clone();
        let text =
            |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
        let kind = text(handler.get("runtime_type"));
        if kind != RUNTIME || !text(handler.get("runtime_path")).is_empty() {
            return Err(unfit(&format!("has the shim {kind}")));
        }
        let options = handler
            .entry("options")
            .or_insert_with(|| Table::new().into());
        let Some(options) = options.as_table_mut() else {
            return Err(unfit("has options that are no table"));
        };
        let program = text(options.get("BinaryName"));
        if !program.is_empty() && !Path::new(&program).ends_with("runc") {
            return Err(unfit(&format!("has the program {program}")));
        }
        options.insert("BinaryName".to_owned(), INSTALLED.into());
        for name in ["pod_annotations", "container_annotations"] {
            let has = handler.get(name).and_then(Value::as_array);
            let mut all = has.cloned().unwrap_or_default();
            if !all.iter().any(|one| one.as_str() == Some(ANNOTATIONS)) {
                all.push(ANNOTATIONS.into());
            }
            handler.insert(name.to_owned(), Value::Array(all));
        }
        Ok(handler)
    }

    /// The folder whose files containerd imports, and the main file's new text if that is to say
    /// so.
    fn imported(
        &self,
        path: &Path,
        (table, text): (&Table, Option<&str>),
        version: i64,
    ) -> Result<(PathBuf, Option<String>), Unfit> {
        let beside = path.parent().unwrap_or(Path::new("/"));
        let named = |table: &Table| -> Option<Vec<String>> {
            let all = table.get("imports")?.as_array()?.iter();
            Some(all.filter_map(Value::as_str).map(str::to_owned).collect())
        };
        let own = named(table);
        let imports = own.clone().or_else(|| named(&self.0)).unwrap_or_default();
        let folder = imports.iter().find_map(|pattern| {
            let folder = pattern.strip_suffix("/*.toml")?;
            (!folder.contains(['*', '?', '['])).then(|| beside.join(folder))
        });
        if let Some(folder) = folder {
            let is_new = text.is_none();
            return Ok((folder, is_new.then(|| format!("version = {version}\n"))));
        }
        if own.is_some_and(|own| !own.is_empty()) {
            let path = path.to_owned();
            return Err(Unfit::Imports { path, imports });
        }
        let folder = beside.join(FOLDER);
        let line = format!("{IMPORTED}\nimports = ['{}/*.toml']\n", folder.display());
        let text = text.unwrap_or("version = 3\n");
        // Behind the version, which is in front of all tables; instead of an empty one.
        let mut new = String::new();
        for old in text.split_inclusive('\n') {
            if is_setting(old, "imports") {
                continue;
            }
            new += old;
            if is_setting(old, "version") && !new.contains(IMPORTED) {
                if !new.ends_with('\n') {
                    new.push('\n');
                }
                new += &line;
            }
        }
        Ok((folder, Some(new)))
    }
}

/// The main file's text without what it got.
pub fn without_imports(text: &str) -> String {
    let mut lines = text.split_inclusive('\n');
    let mut left = String::new();
    while let Some(line) = lines.next() {
        match line.trim_end() == IMPORTED {
            // With what is behind it.
            true => drop(lines.next()),
            false => left += line,
        }
    }
    left
}

/// Whether a line sets this.
fn is_setting(line: &str, name: &str) -> bool {
    let rest = line.trim_start().strip_prefix(name);
    rest.is_some_and(|rest| rest.trim_start().starts_with('='))
}

fn version(table: &Table) -> i64 {
    table
        .get("version")
        .and_then(Value::as_integer)
        .unwrap_or(1)
}

/// What is odd about a handler, if pods cannot come by it.
fn odd(handler: &Table) -> Option<&'static str> {
    let options = handler.get("options");
    let program = options.and_then(|options| options.get("BinaryName")?.as_str());
    if program != Some(INSTALLED) {
        return Some("does not start pageferry-oci");
    }
    let passes = |name: &str| {
        let all = handler.get(name).and_then(Value::as_array);
        all.is_some_and(|all| all.iter().any(|one| one.as_str() == Some(ANNOTATIONS)))
    };
    match passes("pod_annotations") && passes("container_annotations") {
        true => None,
        false => Some("does not tell it of the annotations pageferry.dev/*"),
    }
}

/// The first setting in which two differ.
fn difference(one: &Table, other: &Table, above: &str) -> Option<String> {
    let names = one.keys().chain(other.keys());
    for name in names {
        let path = match above {
            "" => name.clone(),
            _ => format!("{above}.{name}"),
        };
        match (one.get(name), other.get(name)) {
            (Some(Value::Table(one)), Some(Value::Table(other))) => {
                if let Some(differs) = difference(one, other, &path) {
                    return Some(differs);
                }
            }
            (one, other) if one == other => {}
            _ => return Some(path),
        }
    }
    None
}

#[cfg(test)]
#[path = "handler_tests.rs"]
mod tests;
