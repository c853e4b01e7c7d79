//! Extended attributes of an entry, as far as they travel: those of an overlay's layer as the
//! overlay shows them.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;

use crate::XATTR_BYTES_MAX;
use crate::tree::Xattrs;

/// Attributes that say where an overlay has what it lacks: they mean nothing elsewhere.
const LEADS_ELSEWHERE: [&[u8]; 4] = [
    b"trusted.overlay.metacopy",
    b"trusted.overlay.redirect",
    b"user.overlay.metacopy",
    b"user.overlay.redirect",
];

/// Attributes of an overlay that only speed it up at the node that has made them.
const STAYS_HERE: [&[u8]; 8] = [
    b"trusted.overlay.impure",
    b"trusted.overlay.nlink",
    b"trusted.overlay.origin",
    b"trusted.overlay.uuid",
    b"user.overlay.impure",
    b"user.overlay.nlink",
    b"user.overlay.origin",
    b"user.overlay.uuid",
];

/// What an overlay calls its own.
const OVERLAY: &[u8] = b"trusted.overlay.";

/// Behind that, what begins those of an overlay that is made of what this one shows.
const WITHIN: &[u8] = b"overlay.";

/// Of a layer, besides [`STAYS_HERE`], what says nothing of what it shows: that something is upper
/// to another overlay, and flags of inodes, which do not travel.
const SHOWS_NOTHING: [&[u8]; 2] = [b"trusted.overlay.upper", b"trusted.overlay.protattr"];

/// What says that a folder shows nothing of what the layers below have, and how.
const OPAQUE: (&str, &[u8]) = ("trusted.overlay.opaque", b"y");

/// Those of the entry at `path`, whose last component is not followed.
pub fn read(path: &Path, is_of_layer: bool) -> io::Result<Xattrs> {
    let mut found = Xattrs::new();
    let names = names(path)?;
    let mut bytes = 0;
    let mut value = Vec::with_capacity(XATTR_BYTES_MAX);
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        value.clear();
        let at = OsStr::from_bytes(name);
        match rustix::fs::lgetxattr(path, at, rustix::buffer::spare_capacity(&mut value)) {
            Ok(_) => {}
            // Gone meanwhile, or told to nobody.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
            Err(error) => return Err(error.into()),
        }
        let shown = match is_of_layer {
            true => of_layer(name, &value)?,
            false => plain(Cow::Borrowed(name))?,
        };
        let Some(name) = shown else { continue };
        bytes += name.len() + value.len();
        if XATTR_BYTES_MAX < bytes {
            return Err(io::Error::other(format!(
                "it has more than {XATTR_BYTES_MAX} bytes of extended attributes"
            )));
        }
        found.insert(name.into(), value.as_slice().into());
    }
    Ok(found)
}

/// All names, each with a zero behind it.
fn names(path: &Path) -> io::Result<Vec<u8>> {
    let mut names = Vec::with_capacity(4096);
    loop {
        names.clear();
        match rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut names)) {
            Ok(_) | Err(Errno::OPNOTSUPP) => return Ok(names),
            Err(Errno::RANGE) if names.capacity() < XATTR_BYTES_MAX => {
                names.reserve(XATTR_BYTES_MAX);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a folder of a layer shows nothing of what the layers below have.
pub fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 2];
    let read = rustix::fs::lgetxattr(path, OPAQUE.0, &mut value[..]);
    read.is_ok_and(|read| value[..read] == *OPAQUE.1)
}

/// The name of an attribute that travels.
fn plain(name: Cow<'_, [u8]>) -> io::Result<Option<Cow<'_, [u8]>>> {
    if LEADS_ELSEWHERE.contains(&&*name) {
        return Err(io::Error::other(format!(
            "the overlay has it elsewhere ({}): mount it with metacopy=off,redirect_dir=off",
            String::from_utf8_lossy(&name)
        )));
    }
    Ok(Some(name).filter(|name| !STAYS_HERE.contains(&&**name)))
}

/// The same, by which an overlay shows an attribute of its layer.
fn of_layer<'a>(name: &'a [u8], value: &[u8]) -> io::Result<Option<Cow<'a, [u8]>>> {
    let Some(own) = name.strip_prefix(OVERLAY) else {
        return plain(Cow::Borrowed(name));
    };
    if let Some(within) = own.strip_prefix(WITHIN) {
        return plain(Cow::Owned([OVERLAY, within].concat()));
    }
    let is_opaque = (name, value) == (OPAQUE.0.as_bytes(), OPAQUE.1);
    if is_opaque || SHOWS_NOTHING.contains(&name) || plain(Cow::Borrowed(name))?.is_none() {
        return Ok(None);
    }
    Err(io::Error::other(format!(
        "the overlay keeps something in its attribute {} that is not known here",
        String::from_utf8_lossy(name)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_the_attributes_that_its_overlay_shows() {
        let of = |name: &'static str, value: &str| match of_layer(name.as_bytes(), value.as_bytes())
        {
            Ok(Some(name)) => String::from_utf8_lossy(&name).into_owned(),
            Ok(None) => "not".to_owned(),
            Err(error) => format!("refused: {error}"),
        };
        assert_eq!(of("user.mine", "1"), "user.mine");
        assert_eq!(of("security.capability", "1"), "security.capability");
        assert_eq!(of("trusted.overlay.opaque", "y"), "not");
        assert_eq!(
            of("trusted.overlay.overlay.opaque", "y"),
            "trusted.overlay.opaque"
        );
        for name in ["origin", "impure", "nlink", "uuid", "protattr", "upper"] {
            let name = format!("trusted.overlay.{name}").leak();
            assert_eq!(of(name, "1"), "not");
        }
        // Files elsewhere; whiteouts that are files; and what kernels of tomorrow have.
        for (name, value) in [
            ("redirect", "/a"),
            ("metacopy", ""),
            ("opaque", "x"),
            ("whiteout", ""),
            ("verity", "1"),
            ("overlay.redirect", "/a"),
        ] {
            let name = format!("trusted.overlay.{name}").leak();
            assert!(of(name, value).starts_with("refused"), "{name}");
        }
    }
}
