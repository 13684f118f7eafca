//! Files of the store: damaged ones, those of other processes, and those of earlier versions.

use super::{Folder, MONTHS, Node, QUOTAS, config, limits};
use rusqlite::Connection;
use std::fs;
use std::path::{Path, PathBuf};
use tollgate::ledger::OverrideOrigin;
use tollgate::store::Store;

#[test]
fn a_second_process_is_refused_while_the_first_one_runs() {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, "");
    let first = Store::open(&config.store).unwrap();
    let refused = format!("{:#}", Store::open(&config.store).unwrap_err());
    assert!(refused.contains("data/tollgate.db") && refused.contains("another process"), "{refused}");
    drop(first);
    assert!(Store::open(&config.store).is_ok());
}

#[cfg(unix)]
#[test]
fn a_second_process_is_refused_whatever_path_it_uses() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new();
    let config_of = |path: &str| config(&folder.0.path().join(path), QUOTAS, "");
    fs::create_dir(folder.0.path().join("data")).unwrap();
    // The links exist before the file does.
    symlink(folder.file(), folder.0.path().join("link.db")).unwrap();
    symlink(folder.0.path().join("data"), folder.0.path().join("folder")).unwrap();
    let paths = ["link.db", "folder/tollgate.db", "data/../data/tollgate.db", "data/tollgate.db"];
    for first in paths {
        let store = Store::open(&config_of(first).store).unwrap();
        for second in paths {
            let refused = format!("{:#}", Store::open(&config_of(second).store).unwrap_err());
            assert!(refused.contains(second) && refused.contains("another process"), "{first}: {refused}");
        }
        drop(store);
    }
    assert!(!folder.0.path().join("link.db.lock").exists());
}

/// Applies `damage` to a store with usage, and returns the error of opening it.
fn refusal(damage: impl FnOnce(&Path)) -> String {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, "");
    Node::open(&config).spend("gpt-4o", 30, 70);
    damage(&folder.file());
    let error = Node::try_open(&config).err().map(|error| format!("{error:#}"));
    error.unwrap_or_else(|| panic!("the damaged store was opened"))
}

#[test]
fn an_unusable_file_is_refused_with_a_way_to_fix_it() {
    let sql =
        |text: &'static str| move |file: &Path| Connection::open(file).unwrap().execute_batch(text).unwrap();
    for (what, error, fix) in [
        (
            "no database",
            refusal(|file| {
                fs::write(file, "something else, and long enough for a header ".repeat(50)).unwrap();
            }),
            "move it away",
        ),
        (
            "damaged",
            refusal(|file| {
                let mut bytes = fs::read(file).unwrap();
                bytes[4_096..].iter_mut().for_each(|byte| *byte = 0xa5);
                fs::write(file, bytes).unwrap();
            }),
            "move it away",
        ),
        ("another program's", refusal(sql("PRAGMA application_id = 1")), "set another path"),
        ("newer", refusal(sql("PRAGMA user_version = 99")), "run the newer Tollgate"),
        (
            "a folder",
            refusal(|file| {
                fs::remove_file(file).unwrap();
                fs::create_dir(file).unwrap();
            }),
            "set another path",
        ),
    ] {
        assert!(error.contains("data/tollgate.db") && error.contains(fix), "{what}: {error}");
    }
}

#[test]
fn a_read_only_file_is_refused() {
    let error = refusal(|file| {
        // Root can write to read-only files. A directory in place of the WAL prevents writes for every user.
        let log = PathBuf::from(format!("{}-wal", file.display()));
        let _ = fs::remove_file(&log);
        fs::create_dir(&log).unwrap();
    });
    assert!(error.contains("data/tollgate.db"), "{error}");
    let folder = Folder::new();
    fs::write(folder.0.path().join("data"), "a file where the folder should be").unwrap();
    let error = Store::open(&config(&folder.file(), QUOTAS, "").store).unwrap_err();
    assert!(format!("{error:#}").contains("store.path"), "{error:#}");
}

#[tokio::test]
async fn a_file_of_the_first_version_is_migrated() {
    let folder = Folder::new();
    let db = folder.old_file(1);
    db.execute_batch(
        "INSERT INTO quota VALUES
             ('e', 'environment', '', 'total_tokens', 2592000000, 'calendar', 'month', 1000, 40, 0, 2, unixepoch() * 1000),
             ('e', 'environment', '', 'total_tokens', 2592000000, 'rolling', '30d', 2000, 50, 0, 0, unixepoch() * 1000);
         INSERT INTO audit VALUES (1000, 'e', 'all quotas reset');
         INSERT INTO limit_override VALUES ('e', 'environment', '', 'total_tokens', 2592000000, 'month', 77, 77);",
    )
    .unwrap();
    drop(db);
    let node = Node::open(&config(&folder.file(), MONTHS, ""));
    assert_eq!((limits(&node), &node.used()[..2]), (vec![77, 2_000], &[42, 50][..]));
    drop(node);
    assert_eq!(folder.sql("PRAGMA user_version"), 6);
    let audited = "SELECT count(*) FROM audit WHERE at_ms = 1000 AND action = 'all quotas reset' AND target = 'environment ''e'''";
    assert_eq!(folder.sql(audited), 1);
    assert_eq!(folder.sql("SELECT count(*) FROM limit_override WHERE \"window\" = 'calendar'"), 1);
}

#[tokio::test]
async fn a_file_of_the_third_version_gets_the_terms_of_overrides() {
    let folder = Folder::new();
    let db = folder.old_file(3);
    db.execute_batch(
        "INSERT INTO limit_override VALUES ('e', 'environment', '', 'total_tokens', 2592000000, 'calendar', 'month', 77, 77);",
    )
    .unwrap();
    drop(db);
    let node = Node::open(&config(&folder.file(), MONTHS, ""));
    assert_eq!(limits(&node), [77, 2_000]);
    let set = node.account.overrides();
    assert_eq!(set.limits[0].origin, OverrideOrigin::default(), "who set it is not known");
    drop(node);
    assert_eq!(folder.sql("PRAGMA user_version"), 6);
    assert_eq!(folder.sql("SELECT count(*) FROM limit_override WHERE until_ms IS NULL"), 1);
}
