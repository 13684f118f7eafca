//! Changes in folders, as the Linux kernel reports them.

use rustix::fd::OwnedFd;
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use tokio::sync::Notify;

/// Room for many events. Their content does not matter.
const BUFFER_BYTES: usize = 4_096;

/// Reports that something has changed in one of the watched folders. A thread waits for the events.
pub(super) struct FolderEvents {
    inotify: Arc<OwnedFd>,
    /// The kernel's numbers of the watches.
    watches: Vec<i32>,
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
        let inotify = Arc::new(inotify::init(CreateFlags::CLOEXEC)?);
        let shared = Arc::new(Shared::default());
        let of_thread = (inotify.clone(), shared.clone());
        thread::Builder::new()
            .name("file watch".into())
            .spawn(move || wait_for_events(&of_thread.0, &of_thread.1))?;
        Ok(Self { inotify, watches: Vec::new(), shared })
    }

    /// Watches more folders. A folder that does not exist or cannot be watched is left to the comparison of files.
    pub(super) fn watch(&mut self, folders: &BTreeSet<PathBuf>) {
        let changes = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::ATTRIB;
        for folder in folders {
            match inotify::add_watch(&self.inotify, folder, changes) {
                // The kernel knows a folder that is watched already.
                Ok(watch) if self.watches.contains(&watch) => {}
                Ok(watch) => self.watches.push(watch),
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
        for watch in self.watches.drain(..) {
            // A watch ends by itself when its folder is deleted.
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
    }
}

fn wait_for_events(inotify: &OwnedFd, shared: &Shared) {
    let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
    let mut events = Reader::new(inotify, &mut buffer);
    while events.next().is_ok() && !shared.is_over.load(Ordering::Relaxed) {
        shared.has_changed.notify_one();
    }
}
