//! What is done with a request.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::delegate;
use crate::failure::{CONFIG, DECODE, Failure, LATER, LEFT};
use crate::folders::{
    Expected, Folders, Given, Kept, Reserved, StoreError, list, read, remove, write,
};
use crate::range::Range;
use crate::request::{Environment, Request, VERSIONS, Verb, addresses};

/// What came of a request.
#[derive(Debug, Default)]
pub struct Outcome {
    /// For standard output.
    pub output: Vec<u8>,
    /// What went wrong beside the request, for the log: it is tried again with the next one.
    pub trouble: Option<Failure>,
}

/// Does what is asked.
///
/// # Errors
/// What this program or the delegate refuses. Nothing is given then, and nothing freed.
pub fn act(request: &Request) -> Result<Outcome, Failure> {
    match request.verb {
        Verb::Version => {
            let version = match request.version() {
                "" => VERSIONS[0],
                version => version,
            };
            let object = json!({"cniVersion": version, "supportedVersions": VERSIONS});
            Ok(said(&object))
        }
        Verb::Status => pass_on(request, "STATUS", &request.delegated()),
        Verb::Add => {
            let _lock = request.folders().lock()?;
            // What came back meanwhile may be given again.
            let trouble = sweep(request.folders()).err();
            let outcome = add(request)?;
            Ok(Outcome { trouble, ..outcome })
        }
        Verb::Check => check(request),
        Verb::Del => {
            let _lock = request.folders().lock()?;
            delete(request)
        }
        Verb::Gc => {
            let _lock = request.folders().lock()?;
            collect(request)
        }
    }
}

/// Gives an address back to the range, as soon as nobody here has it. Returns whether it was away,
/// or reserved.
///
/// # Errors
/// The file system, or the delegate: the address stays reserved, and it may be called again.
pub fn release(folders: &Folders, address: Ipv4Addr) -> Result<bool, Failure> {
    let _lock = folders.lock()?;
    let out = is_out(folders, address)?;
    folders.returned(address)?;
    sweep(folders)?;
    Ok(out)
}

fn said(object: &Value) -> Outcome {
    let mut output = object.to_string().into_bytes();
    output.push(b'\n');
    let trouble = None;
    Outcome { output, trouble }
}

fn pass_on(request: &Request, verb: &str, config: &Value) -> Result<Outcome, Failure> {
    let name = request.delegate_name()?;
    let output = delegate::call(name, verb, &request.environment, config)?;
    let trouble = None;
    Ok(Outcome { output, trouble })
}

fn add(request: &Request) -> Result<Outcome, Failure> {
    check_left(request)?;
    let Some((namespace, pod)) = request.pod() else {
        return add_of_range(request);
    };
    let expected = match request.folders().expected(namespace, pod) {
        // Nobody can have expected it.
        Err(StoreError::Names { .. }) => None,
        expected => expected?,
    };
    let Some(expected) = expected else {
        return add_of_range(request);
    };
    let uid = known(request, &expected, (namespace, pod))?;
    let range = Range::of(request.delegate())?;
    let gateway = expected.gateway.unwrap_or(range.gateway);
    let told = (request.version(), request.delegate());
    let result = range.result(expected.address, gateway, told)?;
    if Range::gives(request.delegate(), expected.address)
        && !is_out(request.folders(), expected.address)?
    {
        let text = format!(
            "{} is of this node's range and not away: a pod here may have it, and \
             {namespace}/{pod} cannot come with it as long as that is so",
            expected.address
        );
        return Err(Failure::new(LATER, text));
    }
    let pod = format!("{namespace}/{pod}");
    let others = kept(request.folders())?;
    let mut others = others
        .iter()
        .filter(|(_, other)| other.address == expected.address);
    let same = |other: &Kept| other.pod == pod && other.uid.as_deref().is_none_or(|one| one == uid);
    if let Some((_, other)) = others.find(|(_, other)| !same(other)) {
        let text = format!(
            "{} is still that of the pod {} at this node: try again when that is gone",
            expected.address, other.pod
        );
        return Err(Failure::new(LATER, text));
    }
    let kept = Kept {
        address: expected.address,
        pod,
        uid: Some(uid.to_owned()),
        namespace: request.environment.namespace.clone().into(),
    };
    let file = request
        .folders()
        .kept_folder()
        .join(attachment(&request.environment));
    write(&file, &kept)?;
    Ok(said(&result))
}

/// Refuses a pod that runs elsewhere: a kubelet may not have heard that it is to be deleted.
fn check_left(request: &Request) -> Result<(), Failure> {
    let Some(uid) = request.pod_uid() else {
        return Ok(());
    };
    let left = match request.folders().left(uid) {
        // Nobody can have written it down.
        Err(StoreError::Uid { .. }) => None,
        left => left?,
    };
    let Some(left) = left else { return Ok(()) };
    let (namespace, pod) = request.pod().unwrap_or_default();
    let by = left.migration.map(|id| format!(", by migration {id}"));
    let text = format!(
        "the pod {namespace}/{pod} of UID {uid} has moved to another node{}, and is not started \
         here again: delete it; if it is known to run nowhere, remove left/{uid} of the state \
         folder",
        by.unwrap_or_default()
    );
    Err(Failure::new(LEFT, text))
}

/// Whether an address of this node's range is one that no pod of the range has: it is away, or its
/// pod is gone.
fn is_out(folders: &Folders, address: Ipv4Addr) -> Result<bool, StoreError> {
    if folders.is_away(address)? {
        return Ok(true);
    }
    let reserved: Vec<(String, Reserved)> = list(&folders.reserved_folder())?;
    let mut reserved = reserved.iter();
    Ok(reserved.any(|(_, one)| one.addresses.contains(&address)))
}

/// The UID of the pod that is expected, if it is this one. Any other of that name waits: neither
/// may it have the address, which may be in use at its source, nor may the one that is expected
/// come up with another.
fn known<'a>(
    request: &'a Request,
    expected: &Expected,
    (namespace, pod): (&str, &str),
) -> Result<&'a str, Failure> {
    let Some(uid) = request.pod_uid() else {
        let text = format!(
            "the runtime does not say the UID of {namespace}/{pod} (K8S_POD_UID in CNI_ARGS), \
             without which no pod can come with its address"
        );
        return Err(Failure::new(CONFIG, text));
    };
    match &expected.uid {
        Some(one) if one == uid => Ok(uid),
        Some(one) => {
            let text = format!(
                "the pod {namespace}/{pod} that migration {} brings has the UID {one}, and this \
                 one has {uid}: try again when that one is here, or comes no more",
                expected.migration
            );
            Err(Failure::new(LATER, text))
        }
        None => {
            let text = format!(
                "the UID of the pod {namespace}/{pod} that migration {} brings is not known yet: \
                 try again later",
                expected.migration
            );
            Err(Failure::new(LATER, text))
        }
    }
}

/// By the delegate. It keeps what is away reserved; if it has lost that, as by the loss of its
/// files, it is asked again.
fn add_of_range(request: &Request) -> Result<Outcome, Failure> {
    for _ in 0..TRIES {
        let outcome = pass_on(request, "ADD", &request.delegated())?;
        let result: Value = serde_json::from_slice(&outcome.output).map_err(|error| {
            let text = format!("the delegate's result is not understood: {error}");
            Failure::new(DECODE, text)
        })?;
        let given = addresses(&result);
        let elsewhere = needed(request.folders(), None)?;
        let Some(taken) = given.iter().find(|one| elsewhere(**one)) else {
            note(request, given)?;
            return Ok(outcome);
        };
        let trouble = format!("the delegate gave {taken}, which a pod has that has moved");
        pass_on(request, "DEL", &request.delegated())?;
        eprintln!("pageferry-ipam: {trouble}; it is asked for another one");
    }
    let text = "the delegate gives no address but those of pods that have moved: \
                `pageferry-ipam release ADDRESS` gives back one of a pod that is gone";
    Err(Failure::new(LATER, text))
}

/// Keeps what was given: a runtime need not say it when the attachment ends.
fn note(request: &Request, addresses: Vec<Ipv4Addr>) -> Result<(), Failure> {
    let name = attachment(&request.environment);
    let file = request.folders().given_folder().join(name);
    if let Err(error) = write(&file, &Given { addresses }) {
        // Nothing is given.
        pass_on(request, "DEL", &request.delegated())?;
        return Err(error.into());
    }
    Ok(())
}

fn check(request: &Request) -> Result<Outcome, Failure> {
    let file = request
        .folders()
        .kept_folder()
        .join(attachment(&request.environment));
    let Some(kept) = read::<Kept>(&file)? else {
        return pass_on(request, "CHECK", &request.delegated());
    };
    if request.earlier().contains(&kept.address) {
        return Ok(Outcome::default());
    }
    let text = format!(
        "this attachment came with {}, which is not in what the network plugin has of it",
        kept.address
    );
    Err(Failure::new(CONFIG, text))
}

fn delete(request: &Request) -> Result<Outcome, Failure> {
    let folders = request.folders();
    let name = attachment(&request.environment);
    let came = remove(&folders.kept_folder().join(&name))?;
    let noted = folders.given_folder().join(&name);
    let given = read::<Given>(&noted)?.map(|given| given.addresses);
    // One that was made before this kept them is known by what the runtime says alone.
    let mut addresses = given.unwrap_or_default();
    addresses.extend(request.earlier());
    addresses.sort_unstable();
    addresses.dedup();
    if !came && reserve(request, &request.environment, &addresses)? {
        remove(&noted)?;
        return Ok(Outcome::default());
    }
    // Of one that came the delegate knows nothing, and frees nothing.
    let outcome = pass_on(request, "DEL", &request.delegated())?;
    remove(&noted)?;
    let trouble = sweep(folders).err();
    Ok(Outcome { trouble, ..outcome })
}

/// Whether an attachment that ends has an address that must stay in the range; what the delegate
/// is to be told one day is then on disk.
fn reserve(
    request: &Request,
    environment: &Environment,
    addresses: &[Ipv4Addr],
) -> Result<bool, Failure> {
    let folders = request.folders();
    let name = attachment(environment);
    let file = folders.reserved_folder().join(&name);
    if read::<Reserved>(&file)?.is_some() {
        // It is asked again.
        return Ok(true);
    }
    let elsewhere = needed(folders, Some(&name))?;
    if !addresses.iter().any(|address| elsewhere(*address)) {
        return Ok(false);
    }
    let mut config = request.delegated();
    if let Some(config) = config.as_object_mut() {
        config.remove(VALID);
    }
    let reserved = Reserved {
        addresses: addresses.to_vec(),
        delegate: request.delegate_name()?.to_owned(),
        environment: environment.clone(),
        config,
    };
    write(&file, &reserved)?;
    Ok(true)
}

/// Forgets attachments that are no more, and tells the delegate which ones are still valid: those
/// that the runtime has, and those whose addresses are reserved.
fn collect(request: &Request) -> Result<Outcome, Failure> {
    let folders = request.folders();
    let mut config = request.delegated();
    let mut valid = match config[VALID].take() {
        Value::Array(valid) => valid,
        _ => {
            let text = format!("{VALID} is missing in the configuration");
            return Err(Failure::new(CONFIG, text));
        }
    };
    let is_valid = |name: &str| {
        let (container, interface) = name.split_once(':').unwrap_or((name, ""));
        let mut all = valid.iter();
        all.any(|one| one["containerID"] == container && one["ifname"] == interface)
    };
    for (name, _) in list::<Kept>(&folders.kept_folder())? {
        if !is_valid(&name) {
            remove(&folders.kept_folder().join(name))?;
        }
    }
    // One whose end nobody has said here is reserved as if it had been.
    for (name, given) in list::<Given>(&folders.given_folder())? {
        if is_valid(&name) {
            continue;
        }
        let (container, interface) = name.split_once(':').unwrap_or((&name, ""));
        let ended = Environment {
            container: container.to_owned(),
            interface: interface.to_owned(),
            path: request.environment.path.clone(),
            ..Environment::default()
        };
        reserve(request, &ended, &given.addresses)?;
        remove(&folders.given_folder().join(name))?;
    }
    sweep(folders)?;
    for (_, reserved) in list::<Reserved>(&folders.reserved_folder())? {
        let Environment {
            container,
            interface,
            ..
        } = reserved.environment;
        valid.push(json!({"containerID": container, "ifname": interface}));
    }
    config[VALID] = valid.into();
    pass_on(request, "GC", &config)
}

/// Gives back to the range what nobody needs any more.
fn sweep(folders: &Folders) -> Result<(), Failure> {
    let reserved: Vec<(String, Reserved)> = list(&folders.reserved_folder())?;
    if reserved.is_empty() {
        return Ok(());
    }
    let elsewhere = needed(folders, None)?;
    for (name, reserved) in reserved {
        if reserved.addresses.iter().any(|address| elsewhere(*address)) {
            continue;
        }
        let Reserved {
            delegate,
            environment,
            config,
            ..
        } = &reserved;
        delegate::call(delegate, "DEL", environment, config)?;
        remove(&folders.reserved_folder().join(name))?;
    }
    Ok(())
}

/// Which addresses are away, or those of pods that came here with them, but for one attachment.
fn needed(
    folders: &Folders,
    but: Option<&str>,
) -> Result<impl Fn(Ipv4Addr) -> bool + use<>, Failure> {
    let mut kept = kept(folders)?;
    kept.retain(|(name, _)| but != Some(name));
    let here: Vec<Ipv4Addr> = kept.iter().map(|(_, kept)| kept.address).collect();
    let folders = folders.clone();
    // One that cannot be looked for may be away.
    Ok(move |address| here.contains(&address) || folders.is_away(address).unwrap_or(true))
}

/// Attachments with an address that came, whose pods are there.
fn kept(folders: &Folders) -> Result<Vec<(String, Kept)>, StoreError> {
    let mut all: Vec<(String, Kept)> = list(&folders.kept_folder())?;
    all.retain(|(_, kept)| kept.namespace.exists());
    Ok(all)
}

/// What an attachment is called here. Neither part has a colon.
fn attachment(environment: &Environment) -> String {
    format!("{}:{}", environment.container, environment.interface)
}

const VALID: &str = "cni.dev/valid-attachments";
/// So often the delegate is asked for an address that is not in use elsewhere.
const TRIES: usize = 16;
