//! Configuration of the real binary: which source wins, and what is refused.

use std::process::{Command, Output};

use serde_json::Value;

fn sluice(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    command.output().expect("the binary starts")
}

fn effective(arguments: &[&str], environment: &[(&str, &str)]) -> Value {
    let output = sluice(arguments, environment);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON on stdout")
}

fn refusal(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = sluice(arguments, environment);
    assert!(!output.status.success(), "accepted: {}", String::from_utf8_lossy(&output.stdout));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).expect("UTF-8")
}

fn file(content: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a temporary file");
    std::fs::write(file.path(), content).expect("written");
    file
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let file = file("[limits]\nmodels = 7\nsequences = 8\ndrain_seconds = 9\n");
    let path = file.path().to_str().expect("UTF-8");
    let environment = [("SLUICE__LIMITS__SEQUENCES", "18"), ("SLUICE__LIMITS__DRAIN_SECONDS", "19")];
    let arguments = ["config", "--config", path, "--set", "limits.drain_seconds=29", "--format", "json"];
    let config = effective(&arguments, &environment);
    let limits = &config["limits"];
    assert_eq!(limits["models"], 7, "the file wins over the default of 64");
    assert_eq!(limits["sequences"], 18, "the environment wins over the file");
    assert_eq!(limits["drain_seconds"], 29, "a flag wins over the environment");
    assert_eq!(limits["decode_batch"], 256, "what no source names keeps its default");
}

#[test]
fn a_named_flag_is_the_same_as_its_key() {
    let config = effective(&["config", "--format", "json", "--socket", "/tmp/a/b.sock", "--arena-bytes", "3GiB", "--http", "off"], &[]);
    assert_eq!(config["listen"]["socket"], "/tmp/a/b.sock");
    assert_eq!(config["listen"]["side_socket"], "/tmp/a/side.sock", "follows the socket");
    assert_eq!(config["arena"]["capacity_bytes"], 3_u64 << 30);
    assert_eq!(config["listen"]["http"], "off");
}

#[test]
fn the_printed_toml_reads_back_as_itself() {
    let first = sluice(&["config", "--set", "decode.ratio=1/64", "--set", "log.format=json"], &[]);
    assert!(first.status.success());
    let text = String::from_utf8(first.stdout).expect("UTF-8");
    assert!(text.contains("ratio = \"1/64\""), "{text}");
    let file = file(&text);
    let second = sluice(&["config", "--config", file.path().to_str().expect("UTF-8")], &[]);
    assert_eq!(text, String::from_utf8(second.stdout).expect("UTF-8"));
}

#[test]
fn unknown_keys_are_refused_wherever_they_stand() {
    let file = file("[limits]\nsequence = 8\n");
    let refused = refusal(&["config", "--config", file.path().to_str().expect("UTF-8")], &[]);
    assert!(refused.contains("sequence") && refused.contains("sequences") && refused.contains(".toml"), "{refused}");
    let refused = refusal(&["config"], &[("SLUICE__ARENA__FOLDR", "/dev/shm/x")]);
    assert!(refused.contains("foldr"), "{refused}");
    let refused = refusal(&["config", "--set", "nothing.here=1"], &[]);
    assert!(refused.contains("nothing"), "{refused}");
    let refused = refusal(&["config", "--config", "/nowhere/sluice.toml"], &[]);
    assert!(refused.contains("/nowhere/sluice.toml"), "{refused}");
}

#[test]
fn values_out_of_bounds_name_field_value_and_bound() {
    let cases = [
        ("limits.open_slots=1", "limits.open_slots: 1 is outside 2 to 4096"),
        ("limits.message_bytes=2GiB", "limits.message_bytes: 2147483648 is outside 64 KiB to 1 GiB"),
        ("decode.exact_tokens=63", "decode.exact_tokens: 63 is outside 64 to 65536"),
        ("decode.ratio=2/1", "is neither \"dense\" nor a fraction"),
        ("arena.capacity_bytes=12parsecs", "\"12parsecs\" is not a number of bytes"),
        ("listen.socket=relative.sock", "listen.socket: relative.sock is outside absolute paths"),
        ("listen.tcp=0.0.0.0:7000", "listen.tcp: 0.0.0.0:7000 is not a loopback address; without TLS"),
        ("listen.http=192.168.1.2:80", "listen.http: 192.168.1.2:80 is not a loopback address"),
        ("listen.http=localhost", "listen.http: \"localhost\" is outside"),
    ];
    for (setting, expected) in cases {
        let refused = refusal(&["config", "--set", setting], &[]);
        assert!(refused.contains(expected), "{setting}: {refused}");
    }
}
