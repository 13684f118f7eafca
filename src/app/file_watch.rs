//! Notices changes of files, also when a symbolic link on their path is swapped, as Kubernetes does with a ConfigMap.
//!
//! The kernel reports changes in the folders of the files. Some file systems, such as NFS, report nothing. Therefore the
//! files are also compared every few seconds.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use tokio::time::{sleep, timeout};

#[cfg(target_os = "linux")]
mod events;
#[cfg(target_os = "linux")]
use events::FolderEvents;

/// How often files are compared without an event.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Files must stay unchanged for this time before they are read, because editors write in several steps.
const SETTLING_TIME: Duration = Duration::from_millis(200);
/// Files that change all the time are read after this many settling times.
const MAX_SETTLING_ROUNDS: usize = 25;
/// Maximum number of symbolic links on the path of a file.
const MAX_LINKS: usize = 32;

/// What distinguishes a file from an earlier one at the same path. `None`: there is no file.
type Fingerprint = Option<(u64, u64, u64, [i64; 4])>;

/// Watches files.
pub(super) struct FileWatch {
    known: BTreeMap<PathBuf, Fingerprint>,
    #[cfg(target_os = "linux")]
    events: Option<FolderEvents>,
}

impl FileWatch {
    /// Takes the present state of these files as known. The kernel reports changes after [`follow`](Self::follow), which
    /// needs a runtime.
    pub(super) fn of(files: &[PathBuf]) -> Self {
        Self {
            known: files.iter().map(|path| (path.clone(), fingerprint(path))).collect(),
            #[cfg(target_os = "linux")]
            events: None,
        }
    }

    /// Counts this file as changed.
    pub(super) fn mark_as_changed(&mut self, path: &Path) {
        if let Some(known) = self.known.get_mut(path) {
            // No file has this fingerprint.
            *known = Some((0, 0, 0, [0; 4]));
        }
    }

    /// Watches these files from now on, and no others. A file that was watched before keeps its last known state.
    pub(super) fn follow(&mut self, files: &[PathBuf]) {
        let with_state = |path: &PathBuf| {
            let known = self.known.get(path).copied();
            (path.clone(), known.unwrap_or_else(|| fingerprint(path)))
        };
        self.known = files.iter().map(with_state).collect();
        let folders: BTreeSet<PathBuf> = files.iter().flat_map(|path| folders(path)).collect();
        #[cfg(target_os = "linux")]
        if !folders.is_empty() {
            self.watch(&folders);
        }
        #[cfg(not(target_os = "linux"))]
        drop(folders);
    }

    #[cfg(target_os = "linux")]
    fn watch(&mut self, folders: &BTreeSet<PathBuf>) {
        if self.events.is_none() {
            self.events = FolderEvents::new()
                .inspect_err(|error| {
                    tracing::warn!(%error, "the kernel reports no changes of the config file: it is compared every 2 s");
                })
                .ok();
        }
        self.events.iter_mut().for_each(|events| events.watch(folders));
    }

    /// The present state of the files is known from now on.
    pub(super) fn mark(&mut self) {
        self.known.iter_mut().for_each(|(path, known)| *known = fingerprint(path));
    }

    /// Waits until a file has changed and all have settled. Without files this waits for ever.
    pub(super) async fn changed(&mut self) {
        if self.known.is_empty() {
            return std::future::pending().await;
        }
        loop {
            self.wait_for_event().await;
            if self.has_changed() {
                break;
            }
        }
        for _ in 0..MAX_SETTLING_ROUNDS {
            let before = self.present();
            sleep(SETTLING_TIME).await;
            if self.present() == before {
                return;
            }
        }
    }

    async fn wait_for_event(&mut self) {
        #[cfg(target_os = "linux")]
        if let Some(events) = &mut self.events {
            if timeout(POLL_INTERVAL, events.next()).await.is_ok() {
                // Other files in the folder may change all the time.
                sleep(SETTLING_TIME).await;
            }
            return;
        }
        drop(timeout(POLL_INTERVAL, std::future::pending::<()>()).await);
    }

    fn has_changed(&self) -> bool {
        self.known.iter().any(|(path, known)| fingerprint(path) != *known)
    }

    fn present(&self) -> Vec<Fingerprint> {
        self.known.keys().map(|path| fingerprint(path)).collect()
    }
}

fn fingerprint(path: &Path) -> Fingerprint {
    let found = path.metadata().ok()?;
    let times = [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()];
    Some((found.dev(), found.ino(), found.size(), times))
}

/// The folders in which a change can lead the path to another file: that of the file, and that of each symbolic link on the
/// way.
fn folders(path: &Path) -> BTreeSet<PathBuf> {
    let mut folders = BTreeSet::new();
    let mut pending = vec![path.to_owned()];
    let mut links = 0;
    while let Some(path) = pending.pop() {
        let mut prefix = PathBuf::new();
        for component in path.components() {
            prefix.push(component);
            if !matches!(component, Component::Normal(_)) {
                continue;
            }
            let Ok(target) = std::fs::read_link(&prefix) else { continue };
            links += 1;
            let folder = folder_of(&prefix);
            if links <= MAX_LINKS {
                pending.push(folder.join(target));
            }
            folders.insert(folder);
        }
        folders.insert(folder_of(&path));
    }
    folders
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_folder_of_every_link_on_the_way_is_watched() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        std::fs::create_dir_all(root.join("etc/..2026")).unwrap();
        std::fs::create_dir_all(root.join("elsewhere")).unwrap();
        std::fs::write(root.join("elsewhere/t.yaml"), "").unwrap();
        symlink("..2026", root.join("etc/..data")).unwrap();
        symlink("../../elsewhere/t.yaml", root.join("etc/..2026/t.yaml")).unwrap();
        symlink("..data/t.yaml", root.join("etc/t.yaml")).unwrap();
        let watched: Vec<_> =
            folders(&root.join("etc/t.yaml")).iter().map(|folder| folder.canonicalize().unwrap()).collect();
        for folder in ["etc", "etc/..2026", "elsewhere"] {
            assert!(watched.contains(&root.join(folder).canonicalize().unwrap()), "{folder}: {watched:?}");
        }
        symlink("b", root.join("a")).unwrap();
        symlink("a", root.join("b")).unwrap();
        assert!(!folders(&root.join("a")).is_empty(), "a circle of links ends");
    }

    #[tokio::test]
    async fn changes_before_the_kernel_reports_them_are_noticed() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("t.yaml");
        std::fs::write(&file, "1").unwrap();
        let files = [file.clone()];
        let mut marked = FileWatch::of(&files);
        marked.mark_as_changed(&file);
        let mut written = FileWatch::of(&files);
        std::fs::write(&file, "two").unwrap();
        for watch in [&mut marked, &mut written] {
            watch.follow(&files);
            assert!(timeout(Duration::from_secs(20), watch.changed()).await.is_ok());
        }
    }

    #[tokio::test]
    async fn a_replaced_a_swapped_a_deleted_and_a_new_file_are_changes_and_others_are_not() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str| root.path().join(name);
        std::fs::write(file("one"), "1").unwrap();
        std::fs::write(file("two"), "2").unwrap();
        symlink("one", file("link")).unwrap();
        let mut watch = FileWatch::of(&[]);
        watch.follow(&[file("link")]);
        let unrelated = async {
            watch.changed().await;
        };
        std::fs::write(file("other"), "x").unwrap();
        assert!(timeout(Duration::from_millis(600), unrelated).await.is_err());
        let swap = || {
            symlink("two", file("next")).unwrap();
            std::fs::rename(file("next"), file("link")).unwrap();
        };
        let write = || std::fs::write(file("two"), "three").unwrap();
        let delete = || std::fs::remove_file(file("two")).unwrap();
        let create = || std::fs::write(file("two"), "again").unwrap();
        for (what, change) in
            [("swapped", &swap as &dyn Fn()), ("written", &write), ("deleted", &delete), ("created", &create)]
        {
            watch.mark();
            watch.follow(&[file("link")]);
            change();
            assert!(timeout(Duration::from_secs(20), watch.changed()).await.is_ok(), "{what}");
        }
    }
}
