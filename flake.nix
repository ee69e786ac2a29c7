{
  description = "Relays NATS messages to a webhook, and republishes each one after the webhook succeeded, in order";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
        "x86_64-darwin"
        "aarch64-darwin"
      ];
      eachSystem = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      packageFor = pkgs: self.packages.${pkgs.stdenv.hostPlatform.system}.nats-webhook-relay;
      onLinux = pkgs: lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux;
    in
    {
      overlays.default = final: _: {
        nats-webhook-relay = final.callPackage ./nix/package.nix { };
      };

      nixosModules.default = ./nix/module.nix;

      packages = eachSystem (
        pkgs:
        {
          default = packageFor pkgs;
          nats-webhook-relay = pkgs.callPackage ./nix/package.nix { };
        }
        // onLinux pkgs {
          image = pkgs.callPackage ./nix/image.nix { nats-webhook-relay = packageFor pkgs; };
        }
      );

      apps = eachSystem (pkgs: {
        default = {
          type = "app";
          program = lib.getExe (packageFor pkgs);
          meta.description = (packageFor pkgs).meta.description;
        };
      });

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ (packageFor pkgs) ];
          packages = with pkgs; [
            clippy
            nats-server
            natscli
            nodejs
            rust-analyzer
            rustfmt
          ];
          # Here rust-analyzer finds the standard library.
          RUST_SRC_PATH = pkgs.rustPlatform.rustLibSrc;
        };
      });

      checks = eachSystem (
        pkgs:
        let
          package = packageFor pkgs;
        in
        {
          inherit (package.tests) package;

          clippy = pkgs.stdenv.mkDerivation {
            name = "clippy";
            inherit (package) cargoDeps;
            src = self;
            nativeBuildInputs = with pkgs; [
              cargo
              clippy
              rustPlatform.cargoSetupHook
              rustc
            ];
            buildPhase = "cargo clippy --frozen --all-targets -- -D warnings";
            installPhase = "touch $out";
          };

          formatting =
            pkgs.runCommand "formatting"
              {
                nativeBuildInputs = with pkgs; [
                  cargo
                  nixfmt
                  rustfmt
                ];
              }
              ''
                cd ${self}
                cargo fmt --check
                find . -name '*.nix' -exec nixfmt --check {} +
                touch $out
              '';
        }
        // onLinux pkgs {
          module = pkgs.callPackage ./nix/tests/module.nix { };
          option-documentation = pkgs.callPackage ./nix/tests/option-documentation.nix { };
          core-mode = pkgs.testers.runNixOSTest ./nix/tests/core.nix;
          durable-mode = pkgs.testers.runNixOSTest ./nix/tests/durable.nix;
        }
      );

      # nixfmt, run on every Nix file of the project.
      formatter = eachSystem (pkgs: pkgs.nixfmt-tree);
    };
}
