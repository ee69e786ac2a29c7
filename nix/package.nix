{
  lib,
  nats-server,
  rustPlatform,
  stdenv,
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
      ../LICENSE
      ../README.md
      ../benches
      ../examples/prometheus
      ../docs
      ../examples/systemd
      ../fuzz/properties.rs
      (lib.fileset.fileFilter (file: file.hasExt "rs") ../examples)
      ./hardening.nix
      ./log-crates.json
      ./variables.json
      ../scripts/licenses
      ../src
      ../tests
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  # The licences of the crates that are linked belong to the program, in the image as well.
  postInstall = ''
    bash scripts/licenses ${stdenv.hostPlatform.rust.rustcTarget} $out/share/licenses/${manifest.name}
    cp LICENSE $out/share/licenses/${manifest.name}
  '';

  # The tests run real servers and look at the clock. They are a check of the flake; a busy builder
  # must not keep a host from being deployed.
  doCheck = false;
  nativeCheckInputs = [ nats-server ];
  __darwinAllowLocalNetworking = true;

  meta = {
    inherit (manifest) description homepage;
    license = lib.licenses.mit;
    mainProgram = manifest.name;
    platforms = lib.platforms.unix;
  };
}
