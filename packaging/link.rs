//! The build script. It passes `functions.ld` to the linker, which then puts the functions that requests use side by side.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=packaging/link.rs");
    println!("cargo::rerun-if-changed=packaging/functions.ld");
    let variable = |name: &str| env::var(name).unwrap_or_default();
    // These linkers do not read such a script.
    let is_other_linker =
        ["mold", "gold", "wild"].iter().any(|name| variable("CARGO_ENCODED_RUSTFLAGS").contains(name));
    if variable("CARGO_CFG_TARGET_OS") == "linux" && !is_other_linker {
        let script = Path::new(&variable("CARGO_MANIFEST_DIR")).join("packaging/functions.ld");
        println!("cargo::rustc-link-arg-bin=tollgate=-T{}", script.display());
    }
}
