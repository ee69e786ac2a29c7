//! The README and the pages in docs/: their length, and their links.

use std::{
    fs,
    path::{Path, PathBuf},
};

const README: &str = include_str!("../../README.md");
const SETTINGS: &str = include_str!("../../docs/settings.md");

/// An absolute link into the repository begins with this.
const REPOSITORY: &str = concat!(env!("CARGO_PKG_REPOSITORY"), "/");

/// The root of the project, for files that the tests read at run time.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The pages in docs/, by their paths from the root.
fn pages() -> Vec<PathBuf> {
    let pages = fs::read_dir(root().join("docs")).unwrap();
    pages
        .map(|page| Path::new("docs").join(page.unwrap().file_name()))
        .filter(|page| page.extension().is_some_and(|extension| extension == "md"))
        .collect()
}

fn read(page: &Path) -> String {
    fs::read_to_string(root().join(page)).unwrap()
}

/// The lines of a page that are not in a code block.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    text.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    })
}

/// Where the links and images of a page lead to.
fn links(text: &str) -> Vec<&str> {
    prose(text)
        .flat_map(|line| line.split("](").skip(1))
        .map(|rest| rest.split(')').next().unwrap())
        .collect()
}

/// The anchors that GitHub gives to the headings of a page.
fn anchors(text: &str) -> Vec<String> {
    let headings = prose(text).filter_map(|line| line.trim_start_matches('#').strip_prefix(' '));
    headings
        .map(|heading| {
            let kept = heading.to_lowercase().replace(' ', "-");
            kept.replace(|c: char| !c.is_alphanumeric() && c != '-' && c != '_', "")
        })
        .collect()
}

/// Returns what is wrong with a link on a page. GitHub, crates.io and npm resolve relative links, and so does a reader
/// of the source.
fn broken(page: &Path, link: &str) -> Option<&'static str> {
    let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
    if let Some(path) = path.strip_prefix(REPOSITORY) {
        let is_file = path.starts_with("blob/") || path.starts_with("tree/");
        return is_file.then_some("is not relative");
    }
    if path.starts_with("https://") {
        return None;
    }
    let target = match path {
        "" => root().join(page),
        path => root().join(page).parent().unwrap().join(path),
    };
    if !target.exists() {
        return Some("leads nowhere");
    }
    let is_found = || anchors(&read(&target)).iter().any(|found| found == anchor);
    (!anchor.is_empty() && !is_found()).then_some("has no such anchor")
}

#[test]
fn the_readme_is_short() {
    let words = README.split_whitespace().count();
    assert!(words <= 1900, "{words} words");
}

#[test]
fn the_settings_in_the_readme_are_as_in_the_table_of_all() {
    let (_, section) = README.split_once("\n## Settings\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows: Vec<_> = section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    assert!(rows.len() > 5, "{rows:#?}");
    for row in rows {
        assert!(SETTINGS.lines().any(|line| line == row), "{row}");
    }
}

#[test]
fn every_link_leads_somewhere() {
    // A package has only part of what the pages link to.
    if !root().join("scripts/test").exists() {
        return;
    }
    let others = [
        "README.md",
        "CONTRIBUTING.md",
        "tests/mutants.md",
        "SECURITY.md",
        "examples/nextjs/README.md",
    ]
    .map(PathBuf::from);
    let mut wrong = Vec::new();
    for page in pages().into_iter().chain(others) {
        for link in links(&read(&page)) {
            if let Some(reason) = broken(&page, link) {
                wrong.push(format!("{}: {link} {reason}", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_readme_links_to_every_page_and_every_page_to_the_readme() {
    let pages = pages();
    assert!(pages.len() > 5, "{pages:?}");
    for page in pages {
        let found = links(README).iter().any(|link| Path::new(link) == page);
        assert!(found, "{} is not linked to", page.display());
        let text = read(&page);
        let back = "[Back to the README](../README.md)\n";
        assert!(
            text.starts_with(back),
            "{} does not link back",
            page.display()
        );
    }
}
