//! The build script. It passes `functions.ld` to the linker, which then puts the functions that requests use side by side. It
//! warns if the profile of a release build has no effect.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=packaging/link.rs");
    println!("cargo::rerun-if-changed=packaging/functions.ld");
    println!("cargo::rerun-if-changed=packaging/requests.compiler");
    let variable = |name: &str| env::var(name).unwrap_or_default();
    // These linkers do not read such a script.
    let is_other_linker =
        ["mold", "gold", "wild"].iter().any(|name| variable("CARGO_ENCODED_RUSTFLAGS").contains(name));
    let folder = Path::new(&variable("CARGO_MANIFEST_DIR")).join("packaging");
    if variable("CARGO_CFG_TARGET_OS") == "linux" && !is_other_linker {
        println!("cargo::rustc-link-arg-bin=tollgate=-T{}", folder.join("functions.ld").display());
    }
    let compiler = Command::new(variable("RUSTC")).arg("-vV").output().map(|output| output.stdout);
    let profiled = fs::read(folder.join("requests.compiler"));
    let is_release = variable("OUT_DIR").contains("/release/build/");
    if is_release && compiler.ok() != profiled.ok() {
        println!(
            "cargo::warning=packaging/requests.profdata is of another compiler and has no effect: the program takes more CPU time. packaging/profile makes a new one"
        );
    }
}
