{
  lib,
  nats-server,
  rustPlatform,
}:
let
  manifest = (lib.importTOML ../Cargo.toml).package;
in
rustPlatform.buildRustPackage {
  pname = manifest.name;
  inherit (manifest) version;

  # Only what cargo reads, so that nothing else makes it build again.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../.env.example
      ../Cargo.lock
      ../Cargo.toml
      ../README.md
      ../benches
      ../examples/prometheus
      ../docs
      ../examples/systemd
      (lib.fileset.fileFilter (file: file.hasExt "rs") ../examples)
      ./hardening.nix
      ./log-crates.json
      ./variables.json
      ../src
      ../tests
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  # The tests run real servers and look at the clock. They are a check of the flake; a busy builder
  # must not keep a host from being deployed.
  doCheck = false;
  nativeCheckInputs = [ nats-server ];
  __darwinAllowLocalNetworking = true;

  meta = {
    inherit (manifest) description;
    license = lib.licenses.mit;
    mainProgram = manifest.name;
    platforms = lib.platforms.unix;
  };
}
