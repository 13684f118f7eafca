//! What the service manager receives: readiness, reloads, the watchdog, the end, and a new main process. Also `tollgate health`.

use super::gateway::{Place, Process};
use super::http::{MAX_WAIT, get};
use super::load::Load;
use super::upstream::Upstream;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{Command, Output};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// The settings of the environment and of the store.
const SETTINGS: (&str, &str) = ("quotas: { requests: { limit: 1G, per: day } }", "path: '@/t.db'");
/// The watchdog notifies three times within this time.
const WATCHDOG_US: &str = "300000";

/// A service manager's end of the notification socket.
struct Manager {
    socket: UnixDatagram,
    name: String,
    /// All messages so far.
    received: Vec<String>,
}

impl Manager {
    /// Listens at a path, or at an abstract address.
    fn new(place: &Place, is_abstract: bool) -> Self {
        let path = place.folder.path().join("notify").display().to_string();
        let (socket, name) = if is_abstract {
            let address = SocketAddr::from_abstract_name(&path).unwrap();
            (UnixDatagram::bind_addr(&address).unwrap(), format!("@{path}"))
        } else {
            (UnixDatagram::bind(&path).unwrap(), path)
        };
        socket.set_read_timeout(Some(MAX_WAIT)).unwrap();
        Self { socket, name, received: Vec::new() }
    }

    fn start(&self, place: &Place) -> Process {
        place.spawn_with("t.yaml", &[("NOTIFY_SOCKET", &self.name), ("WATCHDOG_USEC", WATCHDOG_US)])
    }

    /// Waits for a message that contains `text`.
    fn wait_for(&mut self, text: &str) -> String {
        let began = Instant::now();
        while began.elapsed() < MAX_WAIT {
            let mut bytes = [0; 4096];
            let length = self.socket.recv(&mut bytes).unwrap_or(0);
            let message = String::from_utf8_lossy(&bytes[..length]).into_owned();
            self.received.push(message.clone());
            if message.contains(text) {
                return message;
            }
        }
        panic!("no {text}: {:?}", self.received);
    }
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success());
}

fn health(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .arg("health")
        .args(arguments)
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn the_service_manager_receives_each_change_of_state() {
    let place = Place::new(1, "drain_timeout: 7s", SETTINGS.0, SETTINGS.1);
    let mut manager = Manager::new(&place, false);
    let mut process = manager.start(&place);
    let pid = process.child.id();
    let ready = manager.wait_for("READY=1\n");
    assert!(ready.contains(&format!("MAINPID={pid}\n")), "{ready}");
    assert!(ready.contains(&format!("STATUS=serving callers at 127.0.0.1:{}", place.port)), "{ready}");
    assert_eq!(get(place.admin, "/readyz").unwrap().status(), 200);
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1\n");
    }
    signal("HUP", pid);
    let reloading = manager.wait_for("RELOADING=1\n");
    assert!(reloading.contains("\nMONOTONIC_USEC="), "{reloading}");
    let ready = manager.wait_for("READY=1\n");
    assert!(!ready.contains("refused"), "{ready}");
    place.write("t.yaml", "environments: 3");
    signal("HUP", pid);
    manager.wait_for("RELOADING=1\n");
    let ready = manager.wait_for("READY=1\n");
    assert!(ready.contains("; the new config was refused: "), "{ready}");
    manager.wait_for("WATCHDOG=1\n");
    process.terminate();
    let stopping = manager.wait_for("STOPPING=1\n");
    // drain_timeout, a second for the ends of answers, and ten for the last commits.
    assert!(stopping.contains("EXTEND_TIMEOUT_USEC=18000000\n"), "{stopping}");
    assert_eq!(process.exit_code(MAX_WAIT), Some(0));
    assert_eq!(manager.received.iter().filter(|message| message.contains("STOPPING")).count(), 1);
}

#[test]
fn a_new_process_becomes_the_main_process_of_the_service_without_a_lost_request() {
    let (upstream, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", SETTINGS.0, SETTINGS.1);
    let mut manager = Manager::new(&place, true);
    let mut first = manager.start(&place);
    manager.wait_for("READY=1\n");
    let load = Load::start(place.port);
    std::thread::sleep(Duration::from_millis(300));
    signal("USR2", first.child.id());
    let ready = manager.wait_for("READY=1\n");
    let pid = ready.lines().find_map(|line| line.strip_prefix("MAINPID=")).unwrap().parse().unwrap();
    assert_ne!(pid, first.child.id());
    let _end = KilledAtEnd(pid);
    std::thread::sleep(Duration::from_millis(300));
    let sums = load.stop();
    sums.assert_faultless();
    assert_eq!(sums.answered.load(SeqCst), sums.sent.load(SeqCst));
    assert_eq!(first.exit_code(MAX_WAIT), Some(0), "{}", first.log());
    // The replaced process has not reported its own end as that of the service.
    assert!(!manager.received.iter().any(|message| message.contains("STOPPING")), "{:?}", manager.received);
    // All these notifications are those of the new process.
    manager.received.clear();
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1\n");
    }
    assert!(upstream.answers.load(SeqCst) > 0);
}

/// A process that is no child of the test.
struct KilledAtEnd(u32);

impl Drop for KilledAtEnd {
    fn drop(&mut self) {
        signal("KILL", self.0);
    }
}

#[test]
fn a_new_process_leaves_connections_in_the_socket_that_the_service_manager_keeps() {
    let place = Place::new(1, "max_connections: 1", SETTINGS.0, SETTINGS.1);
    // The test keeps this socket, as a service manager does.
    let socket = TcpListener::bind(("127.0.0.1", place.port)).unwrap();
    let mut first = place.start_with_socket(&socket);
    let mut second = place.start();
    assert_eq!(first.exit_code(MAX_WAIT), Some(0), "{}", first.log());
    let mut third = place.start();
    assert_eq!(second.exit_code(MAX_WAIT), Some(0), "{}", second.log());
    let mut served = TcpStream::connect(("127.0.0.1", place.port)).unwrap();
    served.write_all(b"GET /nothing HTTP/1.1\r\nhost: g\r\n\r\n").unwrap();
    let mut status = [0; 12];
    served.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 404");
    let mut queued = TcpStream::connect(("127.0.0.1", place.port)).unwrap();
    queued.write_all(b"a request").unwrap();
    third.terminate();
    assert_eq!(third.exit_code(MAX_WAIT), Some(0), "{}", third.log());
    // The next process that the service manager starts would get it.
    socket.set_nonblocking(true).unwrap();
    let accepted = socket.accept();
    let (mut connection, address) = accepted.unwrap_or_else(|error| panic!("{error}\n{}", third.log()));
    assert_eq!(address, queued.local_addr().unwrap());
    drop(queued);
    connection.set_nonblocking(false).unwrap();
    let mut request = String::new();
    connection.read_to_string(&mut request).unwrap();
    assert_eq!(request, "a request");
}

#[test]
fn a_process_that_cannot_be_replaced_continues() {
    let place = Place::new(1, "drain_timeout: 7s", SETTINGS.0, SETTINGS.1);
    let mut process = place.start();
    place.write("t.yaml", "environments: 3");
    signal("USR2", process.child.id());
    // The new process writes the faults of its config to the same log.
    process.wait_for("environments: this must be a mapping");
    assert_eq!(get(place.admin, "/livez").unwrap().status(), 200);
    assert!(process.child.try_wait().unwrap().is_none());
}

#[test]
fn health_follows_the_state_of_the_gateway() {
    let place = Place::new(1, "drain_delay: 20s", SETTINGS.0, SETTINGS.1);
    let config = place.folder.path().join("t.yaml").display().to_string();
    let address = format!("127.0.0.1:{}", place.admin);
    let absent = health(&["--address", &address], &[]);
    let error = String::from_utf8_lossy(&absent.stderr).into_owned();
    assert!(absent.status.code() == Some(1) && error.contains(&address), "{error}");
    let process = place.start();
    let ready = health(&["--config", &config], &[]);
    assert_eq!((ready.status.code(), ready.stdout), (Some(0), b"ready\n".to_vec()));
    // As in a container, where the gateway listens at all addresses, and its config may have a fault since the start.
    place.write("t.yaml", "environments: 3");
    let listen = format!("0.0.0.0:{}", place.admin);
    let variable = [("TOLLGATE__ADMIN__LISTEN", listen.as_str())];
    assert_eq!(health(&["--live", "--config", &config], &variable).status.code(), Some(0));
    assert_eq!(health(&["--config", &config], &[]).status.code(), Some(2));
    process.terminate();
    let began = Instant::now();
    while health(&[], &variable).status.code() != Some(1) {
        assert!(began.elapsed() < MAX_WAIT);
    }
    assert_eq!(health(&["--live"], &variable).status.code(), Some(0));
}

#[test]
fn health_uses_tls_if_the_admin_listener_does() {
    let place = Place::new(1, "drain_timeout: 7s", SETTINGS.0, SETTINGS.1);
    let certified = rcgen::generate_simple_self_signed(vec!["gateway.test".to_owned()]).unwrap();
    place.write("cert.pem", &certified.cert.pem());
    place.write("key.pem", &certified.signing_key.serialize_pem());
    let file = |name: &str| place.folder.path().join(name).display().to_string();
    let plain = format!("127.0.0.1:{}' }}", place.admin);
    let with_tls = format!(
        "127.0.0.1:{}', tls: {{ cert: '{}', key: '{}' }} }}",
        place.admin,
        file("cert.pem"),
        file("key.pem")
    );
    let config = std::fs::read_to_string(file("t.yaml")).unwrap();
    assert!(config.contains(&plain), "{config}");
    place.write("t.yaml", &config.replace(&plain, &with_tls));
    let _process = place.start();
    let ready = health(&["--config", &file("t.yaml")], &[]);
    let output = (ready.status.code(), String::from_utf8_lossy(&ready.stdout).into_owned());
    assert_eq!(output, (Some(0), "ready\n".to_owned()), "{}", String::from_utf8_lossy(&ready.stderr));
}
