//! The unit for distributions without Nix is locked down exactly as the NixOS module's.

#![allow(clippy::unwrap_used, clippy::panic)]

const HARDENING: &str = include_str!("../nix/hardening.nix");
const UNIT: &str = include_str!("../examples/systemd/nats-webhook-relay.service");

/// The attribute set in `nix/hardening.nix` as lines of a unit: `Name = value;` where the value is
/// `true`, a string, or a list of strings, which is a line each.
fn hardening() -> Vec<String> {
    let code: String = HARDENING
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect();
    let attributes = code.trim().trim_start_matches('{').trim_end_matches('}');
    attributes
        .split_terminator(';')
        .filter(|attribute| !attribute.trim().is_empty())
        .flat_map(|attribute| {
            let (name, value) = attribute.split_once(" = ").unwrap();
            let name = name.trim();
            let values: Vec<_> = match value.trim() {
                "true" => vec!["true"],
                // Every other piece between quotes is a string.
                strings => strings.split('"').skip(1).step_by(2).collect(),
            };
            assert!(!values.is_empty(), "not understood: {attribute}");
            values
                .into_iter()
                .map(|value| format!("{name}={value}"))
                .collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn the_example_unit_is_locked_down_like_that_of_the_nixos_module() {
    let marker = "# Sandboxing.\nDynamicUser=true\n";
    let (_, rest) = UNIT.split_once(marker).unwrap();
    let (section, _) = rest.split_once("\n\n").unwrap();
    assert_eq!(section.lines().collect::<Vec<_>>(), hardening());
}
