# Evaluates the module: what becomes of its options, what it refuses, and where secrets end up.
{
  lib,
  pkgs,
  runCommand,
}:
let
  inherit (lib) types;

  # The module by itself, without the rest of NixOS.
  evaluate =
    module:
    (lib.evalModules {
      modules = [
        ../module.nix
        module
        {
          options = {
            assertions = lib.mkOption { type = types.listOf types.attrs; };
            warnings = lib.mkOption { type = types.listOf types.str; };
            system.checks = lib.mkOption { type = types.listOf types.package; };
            systemd.services = lib.mkOption { type = types.lazyAttrsOf (types.attrsOf types.anything); };
          };
          config._module.args = { inherit pkgs; };
        }
      ];
    }).config;

  minimal = {
    enable = true;
    webhookDestination = "http://localhost:3000/hook";
    natsAddress = "nats://localhost";
    natsSubjectPrefix = "cms.cache";
    natsRelayedSubjectPrefix = "relayed.cache";
  };
  evaluateWith =
    changes: evaluate { services.nats-webhook-relay = lib.recursiveUpdate minimal changes; };
  serviceWith = changes: (evaluateWith changes).systemd.services.nats-webhook-relay;
  checksWith = changes: lib.length (evaluateWith changes).system.checks;
  # What the assertions say, or null where a value has the wrong type.
  refusedWith =
    changes:
    let
      inherit (evaluateWith changes) assertions systemd;
      failed = lib.filter (assertion: !assertion.assertion) assertions;
      messages = map (assertion: assertion.message) failed;
      tried = builtins.tryEval (builtins.deepSeq systemd messages);
    in
    if tried.success then tried.value else null;

  # The lanes as docs/growing.md has them.
  lanes =
    let
      afterFence = lib.elemAt (lib.splitString "```nix\n" (lib.readFile ../../docs/growing.md)) 1;
      block = lib.head (lib.splitString "```" afterFence);
    in
    import (builtins.toFile "page.nix" "{ lib }:\n{\n${block}}") { inherit lib; };

  # With the options of the program that this module replaced.
  original = evaluateWith {
    natsUser = "user";
    natsPassword = "hunter2";
    user = "cms";
    group = "cms";
    log = "debug";
  };
  originalService = original.systemd.services.nats-webhook-relay;

  failures = lib.runTests {
    "test every option reaches the environment as it is" = {
      expr =
        (serviceWith {
          webhookDestination = "http://localhost/a%20b http://localhost/c";
          natsUser = "relay";
          natsPasswordFile = "/run/secrets/nats";
          settings = {
            NATS_TLS_FIRST = true;
            SHUTDOWN_TIMEOUT = null;
            WEBHOOK_MAX_ATTEMPTS = 0;
          };
          credentials.WEBHOOK_KEY = "/run/secrets/key";
        }).environment;
      expected = {
        NATS_HOST = "nats://localhost";
        NATS_PASS_FILE = "%d/NATS_PASS";
        NATS_RELAYED_SUBJECT_PREFIX = "relayed.cache";
        NATS_SUBJECT_PREFIX = "cms.cache";
        NATS_TLS_FIRST = "true";
        NATS_USER = "relay";
        RUST_LOG = "info";
        WEBHOOK_DESTINATION = "http://localhost/a%%20b http://localhost/c";
        WEBHOOK_KEY = "%d/WEBHOOK_KEY";
        WEBHOOK_MAX_ATTEMPTS = "0";
      };
    };
    "test systemd reads the files" = {
      expr = {
        inherit
          (
            (serviceWith {
              credentials.NATS_TOKEN = "/run/secrets/100%";
              environmentFiles = [ "-/optional" ];
            }).serviceConfig
          )
          EnvironmentFile
          LoadCredential
          ;
      };
      expected = {
        EnvironmentFile = [ "-/optional" ];
        LoadCredential = [ "NATS_TOKEN:/run/secrets/100%%" ];
      };
    };
    "test a configuration of the original has its user, and its password is not in the unit" = {
      expr = {
        inherit (originalService.serviceConfig) DynamicUser User Group;
        inherit (originalService.environment) RUST_LOG;
        isShown = lib.hasInfix "hunter2" (builtins.toJSON originalService);
        warnings = lib.length original.warnings;
      };
      expected = {
        DynamicUser = false;
        User = "cms";
        Group = "cms";
        RUST_LOG = "debug";
        isShown = false;
        warnings = 1;
      };
    };
    "test stopped before the front end, within the time that the program takes" = {
      expr =
        let
          service = serviceWith {
            after = [ "nextjs.service" ];
            settings.SHUTDOWN_TIMEOUT = "1m";
          };
        in
        [
          (lib.last service.after)
          service.serviceConfig.TimeoutStopSec
        ];
      expected = [
        "nextjs.service"
        "1m 10s"
      ];
    };
    "test what is refused" = {
      expr = map refusedWith [
        { }
        { settings.WEBHOOK_TIMEOT = "5s"; }
        { credentials.NATS_PASSWORD = "/run/secrets/x"; }
        { settings.NATS_PASS = "hunter2"; }
        { settings.NATS_PASS = null; }
        { settings.WEBHOOK_HEADER_X_TOKEN = "hunter2"; }
        { credentials.NATS_PASS = "${pkgs.writeText "password" "hunter2"}"; }
        { environmentFiles = [ "${pkgs.writeText "environment" "NATS_PASS=hunter2"}" ]; }
      ];
      expected = [
        [ ]
        [ "nats-webhook-relay: the program has no variable WEBHOOK_TIMEOT." ]
        [ "nats-webhook-relay: the program has no variable NATS_PASSWORD." ]
        [ "nats-webhook-relay: everyone can read settings.NATS_PASS. Use credentials.NATS_PASS." ]
        [ ]
        [
          "nats-webhook-relay: everyone can read settings.WEBHOOK_HEADER_X_TOKEN. Use credentials.WEBHOOK_HEADER_X_TOKEN."
        ]
        null
        null
      ];
    };
    "test the program checks at build time what is complete then" = {
      expr = map checksWith [
        { }
        { settings.NATS_CA = "${pkgs.writeText "ca" "ca"}"; }
        { settings.NATS_CA = "/etc/ca.pem"; }
        { credentials.NATS_TOKEN = "/run/secrets/x"; }
        { environmentFiles = [ "/run/secrets/x" ]; }
        {
          instances.on = minimal;
          instances.off.enable = false;
        }
      ];
      expected = [
        1
        1
        0
        0
        0
        2
      ];
    };
    "test a credential that systemd decrypts is as good" = {
      expr =
        lib.length
          (evaluate {
            services.nats-webhook-relay = minimal // {
              natsUser = "relay";
            };
            systemd.services.nats-webhook-relay = {
              environment.NATS_PASS_FILE = "%d/NATS_PASS";
              serviceConfig.LoadCredentialEncrypted = "NATS_PASS:/etc/credstore.encrypted/nats";
            };
          }).system.checks;
      expected = 0;
    };
    "test the lanes of the documentation are as many services, each with a consumer of its own" = {
      expr = lib.mapAttrs (_: service: service.environment.NATS_CONSUMER) (evaluate lanes).systemd.services;
      expected = {
        nats-webhook-relay-0 = "lane-4-0";
        nats-webhook-relay-1 = "lane-4-1";
        nats-webhook-relay-2 = "lane-4-2";
        nats-webhook-relay-3 = "lane-4-3";
      };
    };
  };
in
if failures == [ ] then
  runCommand "module" { } "touch $out"
else
  throw (
    lib.concatMapStringsSep "\n" (
      failure: "${failure.name}: ${builtins.toJSON { inherit (failure) expected result; }}"
    ) failures
  )
