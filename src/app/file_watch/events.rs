//! Changes in folders, as the Linux kernel reports them.

use inotify::{Inotify, WatchDescriptor, WatchMask, Watches};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use tokio::sync::Notify;

/// Room for many events. Their content does not matter.
const BUFFER_BYTES: usize = 4_096;

/// Reports that something has changed in one of the watched folders. A thread waits for the events.
pub(super) struct FolderEvents {
    watches: Watches,
    descriptors: Vec<WatchDescriptor>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    has_changed: Notify,
    is_over: AtomicBool,
}

impl FolderEvents {
    /// # Errors
    /// The kernel or the process has no room for another watcher.
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let (watches, shared) = (inotify.watches(), Arc::new(Shared::default()));
        let of_thread = shared.clone();
        thread::Builder::new()
            .name("file watch".into())
            .spawn(move || wait_for_events(inotify, &of_thread))?;
        Ok(Self { watches, descriptors: Vec::new(), shared })
    }

    /// Watches more folders. A folder that does not exist or cannot be watched is left to the comparison of files.
    pub(super) fn watch(&mut self, folders: &BTreeSet<PathBuf>) {
        let changes = WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::DELETE
            | WatchMask::ATTRIB;
        for folder in folders {
            match self.watches.add(folder, changes) {
                // The kernel knows a folder that is watched already.
                Ok(descriptor) if self.descriptors.contains(&descriptor) => {}
                Ok(descriptor) => self.descriptors.push(descriptor),
                Err(error) => {
                    tracing::debug!(%error, folder = %folder.display(), "a folder cannot be watched");
                }
            }
        }
    }

    /// Waits for the next change in a folder.
    pub(super) async fn next(&mut self) {
        self.shared.has_changed.notified().await;
    }
}

impl Drop for FolderEvents {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        // The end of a watch is an event, which wakes the thread.
        for descriptor in self.descriptors.drain(..) {
            drop(self.watches.remove(descriptor));
        }
    }
}

fn wait_for_events(mut inotify: Inotify, shared: &Shared) {
    let mut buffer = [0; BUFFER_BYTES];
    while inotify.read_events_blocking(&mut buffer).is_ok() && !shared.is_over.load(Ordering::Relaxed) {
        shared.has_changed.notify_one();
    }
}
