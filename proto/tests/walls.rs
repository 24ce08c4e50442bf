//! What must stay true of the sources: who may import whom, where `unsafe` lives, how large things are.
//!
//! The walls (docs/ARCHITECTURE.md): proto <- client <- benches; kernels <- client, daemon, benches; proto <- daemon. kernels sees
//! neither proto nor tokio; daemon and client never see each other.

use std::fs;
use std::path::{Path, PathBuf};

/// A crate of the workspace and the other crates of the workspace that it may name.
struct Wall {
    folder: &'static str,
    may_see: &'static [&'static str],
}

const WALLS: [Wall; 5] = [
    Wall { folder: "proto", may_see: &[] },
    Wall { folder: "kernels", may_see: &[] },
    Wall { folder: "client", may_see: &["proto", "kernels"] },
    Wall { folder: "daemon", may_see: &["proto", "kernels"] },
    Wall { folder: "benches", may_see: &["client", "kernels"] },
];

/// What kernels must not depend on, beside the other crates.
const NOT_IN_KERNELS: [&str; 5] = ["tokio", "tonic", "prost", "hyper", "axum"];

/// The one crate that may say `unsafe`.
const UNSAFE: &str = "kernels";

const MAX_FILE_LINES: usize = 700;
const MAX_FUNCTION_LINES: usize = 120;

/// Files and functions that may be larger, each with its reason.
const LARGER: [(&str, &str); 0] = [];

/// Words that promise work for later, and tests that do not run.
const UNFINISHED: [&str; 5] = ["todo!(", "unimplemented!(", "FIXME", "#[ignore", "#[allow("];

struct Source {
    /// Path from the workspace's root.
    path: String,
    text: String,
}

impl Source {
    /// Lines without comments and without the content of strings that begin and end on one line.
    fn code_lines(&self) -> impl Iterator<Item = (usize, String)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, code_of(line)))
    }
}

fn code_of(line: &str) -> String {
    let mut code = String::new();
    let (mut in_string, mut escaped, mut before) = (false, false, ' ');
    for (at, letter) in line.char_indices() {
        if !in_string && line[at..].starts_with("//") {
            break;
        }
        // A quote in a character literal does not begin a string.
        let quote = letter == '"' && !escaped && !(before == '\'' && line[at + 1..].starts_with('\''));
        if quote {
            in_string = !in_string;
        }
        escaped = in_string && letter == '\\' && !escaped;
        before = letter;
        if !in_string || quote {
            code.push(letter);
        }
    }
    code
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn sources(folder: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for part in ["src", "tests", "benches", "examples", "build.rs"] {
        collect(&root().join(folder).join(part), &mut sources);
    }
    assert!(!sources.is_empty(), "no sources in {folder}");
    // This file names what it forbids.
    sources.retain(|source| source.path != file!());
    sources
}

fn collect(path: &Path, sources: &mut Vec<Source>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a folder") {
            collect(&entry.expect("an entry").path(), sources);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") && path.is_file() {
        let shown = path.strip_prefix(root()).expect("below the root").display().to_string();
        sources.push(Source { path: shown, text: fs::read_to_string(path).expect("UTF-8") });
    }
}

/// Whether `word` stands in `code` as a word of its own, and not as a module within another crate (`sluice_proto::v1::sluice_client`).
fn names(code: &str, word: &str) -> bool {
    let part = |letter: Option<char>| letter.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    let outside =
        |at: usize| !part(code[..at].chars().next_back()) && !code[..at].ends_with("::") && !part(code[at + word.len()..].chars().next());
    code.match_indices(word).any(|(at, _)| outside(at))
}

/// Lines of a source whose code names a word.
fn lines_naming(source: &Source, word: &str) -> Vec<String> {
    let lines = source.code_lines().filter(|(_, code)| names(code, word));
    lines.map(|(line, _)| format!("{}:{line} names {word}", source.path)).collect()
}

/// Dependencies of every kind in a manifest.
fn dependencies(manifest: &toml::Table) -> Vec<String> {
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let targets = manifest.get("target").and_then(toml::Value::as_table).into_iter().flat_map(|targets| targets.values());
    let tables = targets.filter_map(toml::Value::as_table).chain([manifest]);
    let found = tables.flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)?.as_table()));
    found.flat_map(|table| table.keys().cloned()).collect()
}

fn forbidden_crates(wall: &Wall) -> Vec<String> {
    let others = WALLS.iter().map(|other| other.folder).filter(|other| *other != wall.folder && !wall.may_see.contains(other));
    let mut forbidden: Vec<String> = others.map(|other| format!("sluice-{}", if other == "benches" { "bench" } else { other })).collect();
    if wall.folder == "kernels" {
        forbidden.extend(NOT_IN_KERNELS.map(str::to_owned));
    }
    forbidden
}

/// Functions with their lengths in lines, found by rustfmt's indentation: the closing brace stands where the function began.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let code = code_of(line);
        let Some(name) = code.split_once("fn ").filter(|(before, _)| is_function_head(before)).map(|(_, after)| after) else { continue };
        // A declaration ends with a semicolon and has no body; a body on one line is short enough.
        let head_ends = lines[first..].iter().find(|line| line.ends_with(['{', ';', '}']));
        if !head_ends.is_some_and(|line| line.ends_with('{')) {
            continue;
        }
        let end = format!("{}}}", &line[..indent]);
        let Some(length) = lines[first..].iter().position(|line| *line == end) else { continue };
        found.push((name.split(['(', '<']).next().unwrap_or_default().to_owned(), length + 1));
    }
    found
}

fn is_function_head(before: &str) -> bool {
    before.split_whitespace().all(|word| ["pub", "const", "async", "unsafe", "extern", "\"\""].contains(&word) || word.starts_with("pub("))
}

fn check(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn manifests_keep_the_walls() {
    let mut faults = Vec::new();
    for wall in &WALLS {
        let text = fs::read_to_string(root().join(wall.folder).join("Cargo.toml")).expect("a manifest");
        let given = dependencies(&text.parse().expect("TOML"));
        assert!(!given.is_empty(), "{}", wall.folder);
        let crossing = forbidden_crates(wall).into_iter().filter(|name| given.contains(name));
        faults.extend(crossing.map(|name| format!("{}/Cargo.toml depends on {name}", wall.folder)));
    }
    check(&faults);
}

#[test]
fn sources_keep_the_walls() {
    let mut faults = Vec::new();
    for wall in &WALLS {
        for source in sources(wall.folder) {
            faults.extend(forbidden_crates(wall).iter().flat_map(|name| lines_naming(&source, &name.replace('-', "_"))));
        }
    }
    check(&faults);
}

#[test]
fn unsafe_lives_in_kernels() {
    let outside = WALLS.iter().filter(|wall| wall.folder != UNSAFE);
    check(&outside.flat_map(|wall| sources(wall.folder)).flat_map(|source| lines_naming(&source, "unsafe")).collect::<Vec<_>>());
    assert!(sources(UNSAFE).iter().any(|source| !lines_naming(source, "unsafe").is_empty()), "the word is found where it is");
}

#[test]
fn files_and_functions_stay_small() {
    let mut faults = Vec::new();
    for source in WALLS.iter().flat_map(|wall| sources(wall.folder)) {
        let excused = |name: &str| LARGER.iter().any(|(larger, _)| *larger == name);
        let lines = source.text.lines().count();
        if lines > MAX_FILE_LINES && !excused(&source.path) {
            faults.push(format!("{}: {lines} lines, at most {MAX_FILE_LINES}", source.path));
        }
        for (name, lines) in functions(&source.text) {
            if lines > MAX_FUNCTION_LINES && !excused(&format!("{}::{name}", source.path)) {
                faults.push(format!("{}: fn {name} has {lines} lines, at most {MAX_FUNCTION_LINES}", source.path));
            }
        }
    }
    check(&faults);
}

#[test]
fn nothing_is_left_unfinished() {
    let mut faults = Vec::new();
    for source in WALLS.iter().flat_map(|wall| sources(wall.folder)) {
        for word in UNFINISHED {
            let lines = source.text.lines().enumerate().filter(|(_, line)| line.contains(word));
            faults.extend(lines.map(|(index, _)| format!("{}:{} says {word}", source.path, index + 1)));
        }
    }
    check(&faults);
}

/// The checks above find what they look for.
#[test]
fn planted_faults_are_found() {
    let source = |text: &str| Source { path: "planted.rs".to_owned(), text: text.to_owned() };
    assert_eq!(lines_naming(&source("use a;\nuse tokio::net;\n"), "tokio"), ["planted.rs:2 names tokio"]);
    assert_eq!(lines_naming(&source("// tokio\nlet a = \"tokio\"; // tokio\nuse tokio_stream::x;\n"), "tokio"), [""; 0]);
    assert_eq!(lines_naming(&source("let a = '\"'; unsafe { b() }\n"), "unsafe").len(), 1);
    assert_eq!(lines_naming(&source("use sluice_proto::v1::sluice_client::A;\nuse sluice_client::B;\n"), "sluice_client").len(), 1);
    let text = "trait B {\n    fn declared(\n        a: u8,\n    );\n    fn short() {}\n}\nimpl A {\n    pub(crate) const fn small() {\n        b(\n        )\n    }\n}\n\npub async fn large<T>() {\n".to_owned()
        + &"    c();\n".repeat(200)
        + "}\n";
    assert_eq!(functions(&text), [("small".to_owned(), 4), ("large".to_owned(), 202)]);
    let manifest = "[dependencies]\na = \"1\"\n[target.'cfg(unix)'.dependencies]\nb = \"1\"\n[dev-dependencies]\nc.workspace = true\n";
    let mut found = dependencies(&manifest.parse().expect("TOML"));
    found.sort_unstable();
    assert_eq!(found, ["a", "b", "c"]);
    assert!(forbidden_crates(&WALLS[1]).iter().any(|name| name == "tokio"));
    assert!(forbidden_crates(&WALLS[3]).iter().any(|name| name == "sluice-client"));
}
