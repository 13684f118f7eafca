//! `tollgate man`: the pages of all commands, rendered by the programs of this machine.

use crate::support::*;
use std::path::Path;
use std::process::Command;

/// The page as text, by the first program that is installed.
fn rendered(page: &Path) -> Option<(String, String)> {
    let path = page.to_str().unwrap();
    let programs: [(&str, &[&str]); 3] = [
        ("groff", &["-man", "-Tascii", "-ww", "-rLL=200n", "-rHY=0", path]),
        ("mandoc", &["-Tascii", "-Owidth=200", path]),
        ("man", &["-l", path]),
    ];
    programs.iter().find_map(|(program, arguments)| {
        let mut command = Command::new(program);
        let output =
            command.args(*arguments).env("MANWIDTH", "200").env("GROFF_NO_SGR", "1").output().ok()?;
        assert!(output.status.success(), "{program} {path}");
        let text = String::from_utf8(output.stdout).unwrap();
        // Bold and underlined characters are written twice, with a backspace between them.
        let mut plain: Vec<char> = Vec::new();
        for c in text.chars() {
            if c == '\u{8}' {
                plain.pop();
            } else {
                plain.push(c);
            }
        }
        Some((plain.into_iter().collect(), String::from_utf8(output.stderr).unwrap()))
    })
}

#[test]
fn every_page_renders_with_all_options_of_its_command() {
    let folder = tempfile::tempdir().unwrap();
    let (code, output, errors) = run(&["man", folder.path().to_str().unwrap()], "");
    assert_eq!(code, 0, "{errors}");
    let mut pages: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|page| page.unwrap().path()).collect();
    pages.sort();
    assert!(pages.len() > 10 && output.contains(&format!("Wrote {} pages", pages.len())), "{output}");
    for page in &pages {
        let name = page.file_stem().unwrap().to_str().unwrap();
        let Some((text, warnings)) = rendered(page) else {
            println!("neither groff, mandoc nor man is installed, so the pages are not rendered");
            return;
        };
        assert_eq!(warnings, "", "{name}");
        for section in ["NAME", "SYNOPSIS", "EXAMPLES", "EXIT STATUS", "SEE ALSO"] {
            assert!(text.contains(&format!("\n{section}\n")), "{name}: {section}\n{text}");
        }
        let help = match name.strip_prefix("tollgate-") {
            Some(command) => run(&[command, "--help"], "").1,
            None => run(&["--help"], "").1,
        };
        let options = help.split([' ', ',', '\n', '[', ']', ';', '`']).filter(|word| word.starts_with("--"));
        for option in options {
            assert!(text.contains(option), "{name}: {option}\n{text}");
        }
    }
    assert_eq!(run(&["man"], "").1, std::fs::read_to_string(folder.path().join("tollgate.1")).unwrap());
}
