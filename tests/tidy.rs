//! Keeps the written style of the source and the directions of dependency.
//!
//! The checks look at the text alone and lean on rustfmt: an item ends at the column where it
//! began. So they can be fooled; they are here to remind.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::{env, fs};

const LINE_COLUMNS_MAX: usize = 100;
const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 400;

/// The files that may hold `unsafe`.
const UNSAFE: &[&str] = &[
    "src/sys.rs",
    "src/engine/uring.rs",
    "src/engine/uring/buffers.rs",
    "src/engine/uring/waiting.rs",
];
/// The files that may call setns. The load generator is a program apart.
const SETNS: &[&str] = &["src/netns.rs", "src/bin/nsplice-load.rs"];
/// The modules that may use the command line.
const CLI: &[&str] = &["lib", "main", "cli"];

/// What a rule asks for, and the lines, counted from 0, that break it.
type Rule = (&'static str, fn(&Source) -> Vec<usize>);

/// Test modules are exempt from all but the first.
const RULES: &[Rule] = &[
    ("a line has at most 100 columns", |s| {
        find(&s.text, |line| line.chars().count() > LINE_COLUMNS_MAX)
    }),
    ("a file has at most 400 lines, tests apart", |s| {
        (s.code.trim_end().lines().count() > FILE_LINES_MAX)
            .then_some(FILE_LINES_MAX)
            .into_iter()
            .collect()
    }),
    ("a function has at most 70 lines", |s| {
        let long = |&(first, last): &(usize, usize)| last - first >= FUNCTION_LINES_MAX;
        s.functions().into_iter().filter(long).map(|(first, _)| first).collect()
    }),
    ("`unsafe` is for the files listed in tests/tidy.rs", |s| s.words_outside("unsafe", UNSAFE)),
    ("an `unsafe` block has a SAFETY comment just above", |s| {
        let blocks = find(&s.code, |line| line.contains("unsafe {"));
        blocks.into_iter().filter(|&line| !s.explains_safety(line)).collect()
    }),
    ("no `.unwrap()`", |s| find(&s.code, |line| line.contains(".unwrap()"))),
    ("no `async`", |s| s.words_outside("async", &[])),
    ("netns.rs alone calls setns", |s| s.words_outside("setns", SETNS)),
];

/// What of the crate a module may use, beside itself.
const MAY_USE: &[(&str, &[&str])] = &[
    ("flow", &["config"]),
    (
        "engine",
        &[
            "config::SocketOptions",
            "error",
            "flow::Op",
            "flow::half::BUFFER_BYTES",
            "mostly",
            "pipe",
            "socket",
            "sys",
        ],
    ),
    ("config", &["error"]),
];

#[test]
fn the_source_keeps_the_written_style() {
    let mut violations = Vec::new();
    for source in sources() {
        for (rule, broken) in RULES {
            violations.extend(broken(&source).into_iter().map(|line| source.at(line, rule)));
        }
    }
    assert_none(&violations);
}

#[test]
fn dependencies_keep_their_direction() {
    assert_none(&sources().iter().flat_map(wrong_directions).collect::<Vec<_>>());
}

#[test]
fn no_tracked_file_names_a_place_on_one_machine() {
    let mut violations = Vec::new();
    for (name, text) in tracked_texts() {
        for line in find(&text, names_machine_path) {
            violations.push(format!("{name}:{}: a path of one machine", line + 1));
        }
    }
    assert_none(&violations);
}

#[test]
fn files_that_are_named_exist() {
    let mut violations = Vec::new();
    for (name, text) in tracked_texts().into_iter().filter(|(name, _)| name != "tests/tidy.rs") {
        for line in find(&text, |line| named_files(line).any(|file| !root().join(file).exists())) {
            violations.push(format!("{name}:{}: names a file that is not there", line + 1));
        }
    }
    assert_none(&violations);
}

/// Such as `tests/tidy.rs` in its own text.
fn named_files(line: &str) -> impl Iterator<Item = &str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    line.split(move |c| !is_part(c)).map(|word| word.trim_end_matches('.')).filter(|word| {
        let folder = word.split('/').next().unwrap_or_default();
        ["src", "tests", "docs", "benches"].contains(&folder) && word.ends_with(".rs")
    })
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Names and texts of all files that git knows.
fn tracked_texts() -> Vec<(String, String)> {
    // A checkout of another user's is as good here.
    let git = ["-c", "safe.directory=*", "ls-files", "-z"];
    let listed = Command::new("git").args(git).current_dir(root()).output();
    let Some(listed) = listed.ok().filter(|output| output.status.success()) else {
        assert!(env::var("CI").as_deref() != Ok("true"), "git cannot list the tracked files");
        eprintln!("skipped: git cannot list the tracked files");
        return Vec::new();
    };
    let names = String::from_utf8(listed.stdout).unwrap();
    // What cannot be read is no text, or is deleted and not yet committed.
    let text = |name: &str| fs::read_to_string(root().join(name)).unwrap_or_default();
    names.split_terminator('\0').map(|name| (name.to_owned(), text(name))).collect()
}

/// Crates the program is built from, macros included, itself not: 22 where this was written.
const CRATES_MAX: usize = 24;

#[test]
fn the_program_is_built_from_few_crates_each_for_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let crates = |depth: &str| {
        let tree = ["tree", "--offline", "--locked", "-e", "normal", "--prefix", "none"];
        let mut command = Command::new(env::var_os("CARGO").expect("cargo runs the tests"));
        let output = command.args(tree).args(["--depth", depth]).current_dir(root).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        // NAME VERSION and, of one that was named before, (*). The first is the program itself.
        let text = String::from_utf8(output.stdout).unwrap();
        let mut crates: Vec<String> = text.lines().skip(1).map(|l| l.replace(" (*)", "")).collect();
        crates.sort();
        crates.dedup();
        crates
    };
    let all = crates("100");
    assert!((1..=CRATES_MAX).contains(&all.len()), "{} crates: {all:?}", all.len());
    let is_tool = |name: &String| name.starts_with("tokio") || name.starts_with("criterion");
    assert!(!all.iter().any(is_tool), "what benchmarks need: {all:?}");
    let architecture = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    for direct in crates("1") {
        let name = direct.split_whitespace().next().unwrap();
        let row = architecture
            .lines()
            .find(|line| line.starts_with("| `") && line.contains(&format!("`{name}`")));
        assert!(row.is_some(), "ARCHITECTURE.md gives no reason for {name}");
    }
}

#[test]
fn every_rule_finds_what_it_is_for() {
    let text = [
        "fn f() {\n",
        &"    x();\n".repeat(FILE_LINES_MAX),
        "}\nasync fn g() {\n    unsafe { setns().unwrap() }\n}\n",
        &"/".repeat(LINE_COLUMNS_MAX + 1),
    ];
    let bad = Source::new("src/x.rs", &text.concat());
    for (rule, broken) in RULES {
        assert_eq!(broken(&bad).len(), 1, "{rule}");
    }
    let text = "use crate::{\n    cli,\n    flow::{self, Side},\n};\nstatic X: T = crate::flow::half::X;\n";
    for (path, count) in [("src/config.rs", 5), ("src/flow.rs", 2), ("src/cli/x.rs", 0)] {
        assert_eq!(wrong_directions(&Source::new(path, text)).len(), count, "{path}");
    }
    assert!(names_machine_path(&format!("see {}home/me/x", '/')));
    assert!(!names_machine_path("docs/work/x ~/home ./root"));
}

#[test]
fn comments_literals_and_tests_break_no_rule() {
    let text = r##"/// async
fn f<'a>() { // unsafe
    g('"', '\'', r#""setns"#);
    h("async \" .unwrap()
    unsafe {");
    // SAFETY: none is needed
    let x =
        unsafe { x };
}
#[cfg(test)]
mod tests {
    use crate::cli;
    async fn f() {}
}
"##;
    let good = Source::new("src/sys.rs", text);
    for (rule, broken) in RULES {
        assert_eq!(broken(&good), [0; 0], "{rule}");
    }
    assert_eq!(wrong_directions(&good), [""; 0]);
    assert_eq!(good.functions(), [(1, 8)]);
}

/// A file of the crate.
struct Source {
    /// From the crate's directory.
    path: String,
    text: String,
    /// The text with blanks for comments, literals and test modules.
    code: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let is_test = path.ends_with("/tests.rs") || path.contains("/tests/");
        let code = if is_test { String::new() } else { without_tests(&without_literals(text)) };
        Self { path: path.to_owned(), text: text.to_owned(), code }
    }

    fn at(&self, line: usize, rule: &str) -> String {
        format!("{}:{}: {rule}", self.path, line + 1)
    }

    fn words_outside(&self, word: &str, files: &[&str]) -> Vec<usize> {
        let is_word = |line: &str| line.split(|c| !is_name(c)).any(|part| part == word);
        if files.contains(&&*self.path) { Vec::new() } else { find(&self.code, is_word) }
    }

    /// The first and the last line of each function.
    fn functions(&self) -> Vec<(usize, usize)> {
        const BEFORE: &[&str] =
            &["pub", "pub(crate)", "pub(super)", "const", "unsafe", "extern", "async"];
        let is_start = |line: &str| {
            let word = line.split_whitespace().find(|word| !BEFORE.contains(word));
            word == Some("fn")
        };
        let starts = find(&self.code, is_start).into_iter();
        starts.map(|first| (first, item_end(&self.code, first))).collect()
    }

    /// Whether a comment above the statement that `line` belongs to says why it is safe.
    fn explains_safety(&self, line: usize) -> bool {
        let lines: Vec<&str> = self.text.lines().take(line).map(str::trim).collect();
        let is_comment = |line: &&&str| line.starts_with("//");
        let ends_statement = |line: &&&str| line.ends_with([';', '{', '}']) || line.is_empty();
        let same_statement = |line: &&&str| !is_comment(line) && !ends_statement(line);
        let above = lines.iter().rev().skip_while(same_statement).take_while(is_comment);
        above.into_iter().any(|line| line.starts_with("// SAFETY:"))
    }

    /// What it uses of the crate, such as `flow::Op`, and in which line.
    fn uses(&self) -> Vec<(usize, String)> {
        let mut uses = Vec::new();
        for (start, name) in self.code.match_indices("crate::") {
            let line = self.code[..start].matches('\n').count();
            let paths = expand(&self.code[start + name.len()..]);
            uses.extend(paths.into_iter().map(|path| (line, path)));
        }
        uses
    }
}

/// Every file of src/.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut sources, mut directories) = (Vec::new(), vec![root.join("src")]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap();
                sources.push(Source::new(name, &fs::read_to_string(&path).unwrap()));
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

fn wrong_directions(source: &Source) -> Vec<String> {
    let is_in = |path: &str, module: &str| format!("{path}::").starts_with(&format!("{module}::"));
    let module = source.path.trim_start_matches("src/").trim_end_matches(".rs").replace('/', "::");
    let mut violations = Vec::new();
    for (line, used) in source.uses() {
        for (user, may_use) in MAY_USE.iter().filter(|(user, _)| is_in(&module, user)) {
            if !is_in(&used, user) && !may_use.iter().any(|allowed| is_in(&used, allowed)) {
                let rule = format!("uses {used}, but {user} may use {} only", may_use.join(", "));
                violations.push(source.at(line, &rule));
            }
        }
        if is_in(&used, "cli") && !CLI.iter().any(|user| is_in(&module, user)) {
            violations.push(source.at(line, "uses cli, which is for lib and main"));
        }
    }
    violations
}

/// The paths of a use tree: `a::{b, c::d};` is `a::b` and `a::c::d`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim_start();
    let end = tree.find(|c| !is_name(c) && c != ':').unwrap_or(tree.len());
    let (head, rest) = tree.split_at(end);
    let Some(group) = rest.strip_prefix('{') else {
        return vec![head.trim_end_matches(':').to_owned()];
    };
    let (mut paths, mut depth, mut start) = (Vec::new(), 0, 0);
    for (index, c) in group.char_indices() {
        if depth == 0 && (c == ',' || c == '}') {
            let inner = expand(&group[start..index]);
            paths.extend(
                inner.iter().filter(|path| !path.is_empty()).map(|path| format!("{head}{path}")),
            );
            start = index + 1;
        }
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            _ => {}
        }
    }
    paths
}

/// Blanks comments, strings and characters.
fn without_literals(text: &str) -> String {
    let (mut code, mut rest) = (String::new(), text);
    while let Some(c) = rest.chars().next() {
        let length = literal_bytes(rest);
        if length == 0 {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            let (literal, after) = rest.split_at(length);
            code.extend(literal.chars().map(|c| if c == '\n' { c } else { ' ' }));
            rest = after;
        }
    }
    code
}

/// Length of the comment or literal that `text` begins with, or 0.
fn literal_bytes(text: &str) -> usize {
    let unescaped = |quote: char| {
        let mut escaped = false;
        let is_end = |&(_, c): &(usize, char)| {
            let end = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            end
        };
        text.char_indices().skip(1).find(is_end).map_or(text.len(), |(at, _)| at + 1)
    };
    let hashes = text.get(1..).map_or(0, |text| text.len() - text.trim_start_matches('#').len());
    let mut chars = text.chars();
    match (chars.next(), chars.next(), chars.next()) {
        (Some('/'), Some('/'), _) => text.find('\n').unwrap_or(text.len()),
        (Some('r'), ..) if text[1 + hashes..].starts_with('"') => {
            let (start, end) = (hashes + 2, format!("\"{}", "#".repeat(hashes)));
            text[start..].find(&end).map_or(text.len(), |at| start + at + end.len())
        }
        (Some('"'), ..) => unescaped('"'),
        (Some('\''), Some('\\'), _) | (Some('\''), _, Some('\'')) => unescaped('\''),
        _ => 0,
    }
}

/// Blanks the items behind `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let mut lines: Vec<&str> = code.lines().collect();
    for first in find(code, |line| line.trim() == "#[cfg(test)]") {
        lines[first..=item_end(code, first + 1)].fill("");
    }
    lines.join("\n")
}

/// The last line of the item that begins in line `first`.
fn item_end(code: &str, first: usize) -> usize {
    let column = |line: &str| line.len() - line.trim_start().len();
    let mut lines = code.lines().enumerate().skip(first);
    let start = column(code.lines().nth(first).unwrap_or_default());
    let is_end = |line: &str| column(line) == start && line.trim_end().ends_with([';', '}']);
    lines.find(|(_, line)| is_end(line)).map_or(first, |(last, _)| last)
}

fn names_machine_path(line: &str) -> bool {
    ["work", "root", "home"].iter().any(|name| {
        line.match_indices(&format!("/{name}")).any(|(start, found)| {
            let before = line[..start].chars().next_back();
            let after = line[start + found.len()..].chars().next();
            let is_part = |c: char| is_name(c) || ['.', '-', '~', '}', ')', '/'].contains(&c);
            !before.is_some_and(is_part) && !after.is_some_and(|c| is_name(c) || c == '-')
        })
    })
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The lines, counted from 0, for which `wanted` is true.
fn find(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<usize> {
    text.lines().enumerate().filter(|(_, line)| wanted(line)).map(|(number, _)| number).collect()
}

fn assert_none(violations: &[String]) {
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}
