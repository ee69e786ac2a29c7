{
  lib,
  nats-server,
  rustPlatform,
  stdenv,
  util-linux,
}:
let
  manifest = (lib.importTOML ../Cargo.toml).package;
in
rustPlatform.buildRustPackage (finalAttrs: {
  pname = manifest.name;
  inherit (manifest) version;

  # Only what the program is made of, so that nothing else makes it build again.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../LICENSE
      ../scripts/licenses
      ../src
    ];
  };
  cargoLock.lockFile = ../Cargo.lock;

  # The file of every target in the manifest must exist.
  postPatch = ''
    mkdir -p benches/relay
    touch benches/relay/main.rs
  '';

  # The licences of the crates that are linked belong to the program, in the image as well.
  postInstall = ''
    bash scripts/licenses ${stdenv.hostPlatform.rust.rustcTarget} $out/share/licenses/${manifest.name}
    cp LICENSE $out/share/licenses/${manifest.name}
  '';

  # The tests run real servers and look at the clock. A busy builder must not keep a host from being
  # deployed.
  doCheck = false;
  passthru.tests.package = finalAttrs.finalPackage.overrideAttrs {
    src = lib.cleanSource ../.;
    doCheck = true;
  };
  nativeCheckInputs = [
    nats-server
    util-linux # kill, mount, unshare
  ];
  __darwinAllowLocalNetworking = true;

  meta = {
    inherit (manifest) description homepage;
    license = lib.licenses.mit;
    mainProgram = manifest.name;
    maintainers = [
      {
        name = "wunderwerk";
        github = "wunderwerkio";
      }
    ];
    platforms = lib.platforms.unix;
  };
})
