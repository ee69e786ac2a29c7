# Evaluates the module: what it refuses and warns about, and where secrets end up.
{
  lib,
  pkgs,
  runCommand,
}:
let
  inherit (lib) types;

  # The module by itself, without the rest of NixOS.
  evaluate =
    relay:
    (lib.evalModules {
      modules = [
        ../module.nix
        {
          options = {
            assertions = lib.mkOption { type = types.listOf types.attrs; };
            warnings = lib.mkOption { type = types.listOf types.str; };
            systemd.services = lib.mkOption { type = types.attrsOf types.attrs; };
          };
          config = {
            _module.args = { inherit pkgs; };
            services.nats-webhook-relay = relay;
          };
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
  # Another relay beside that.
  preview = minimal // {
    natsRelayedSubjectPrefix = "relayed-preview.cache";
  };
  evaluateWith = changes: evaluate (lib.recursiveUpdate minimal changes);

  refused =
    changes:
    map (assertion: assertion.message) (
      lib.filter (assertion: !assertion.assertion) (evaluateWith changes).assertions
    );

  # The lanes as the documentation has them: the example of the option, and that of docs/growing.md.
  evaluateText = name: text: import (builtins.toFile name "{ lib }:\n${text}") { inherit lib; };
  exampleOfOption =
    evaluateText "option.nix"
      (
        (lib.evalModules {
          modules = [
            ../module.nix
            {
              _module.check = false;
              _module.args = { inherit pkgs; };
            }
          ];
        }).options.services.nats-webhook-relay.type.getSubOptions
        [ ]
      ).instances.example.text;
  exampleOfPage =
    let
      afterFence = lib.elemAt (lib.splitString "```nix\n" (lib.readFile ../../docs/growing.md)) 1;
      block = lib.head (lib.splitString "```" afterFence);
    in
    (evaluateText "page.nix" "{\n${block}}").services.nats-webhook-relay.instances;

  # A part of the one message that each change of the minimal configuration must lead to.
  refusals = [
    {
      change.settings.WEBHOOK_TIMEOT = "5s";
      message = "settings.WEBHOOK_TIMEOT: there is no such variable";
    }
    {
      change.credentials.NATS_PASSWORD = "/run/secrets/x";
      message = "credentials.NATS_PASSWORD: there is no such variable";
    }
    {
      change = {
        natsUser = "relay";
        settings.NATS_PASS = "hunter2";
      };
      message = "set credentials.NATS_PASS to its path";
    }
    {
      change.credentials.NATS_HOST = "/run/secrets/x";
      message = "credentials.NATS_HOST is set, and so is settings.NATS_HOST";
    }
    {
      change = {
        natsUser = "relay";
        natsPassword = "hunter2";
        natsPasswordFile = "/run/secrets/x";
      };
      message = "Keep natsPasswordFile";
    }
    {
      change = {
        natsUser = "relay";
        natsPasswordFile = ./module.nix;
      };
      message = "credentials.NATS_PASS is in the Nix store";
    }
    {
      change = {
        natsUser = "relay";
        natsPasswordFile = "${pkgs.writeText "password" "hunter2"}";
      };
      message = "credentials.NATS_PASS is in the Nix store";
    }
    {
      change.environmentFiles = [ ./module.nix ];
      message = "is in the Nix store";
    }
    {
      change.settings.WEBHOOK_KEY = "${pkgs.writeText "key" "key"}";
      message = "settings.WEBHOOK_KEY is in the Nix store";
    }
    {
      change.webhookDestination = null;
      message = "webhookDestination is not set";
    }
    {
      change.natsUser = "relay";
      message = "natsUser and natsPasswordFile belong together";
    }
    {
      change.natsPasswordFile = "/run/secrets/x";
      message = "natsUser and natsPasswordFile belong together";
    }
    {
      change.natsRelayedSubjectPrefix = "cms.cache.relayed";
      message = "overlap";
    }
    {
      change.natsRelayedSubjectPrefix = "cms.cache";
      message = "overlap";
    }
    {
      change.natsRelayedSubjectPrefix = "cms";
      message = "overlap";
    }
    {
      change.settings.NATS_INBOX_PREFIX = "cms.cache.inbox";
      message = "overlap";
    }
    {
      change.webhookDestination = [
        "http://localhost/hook"
        "http://localhost/hook?secret=hunter2"
      ];
      message = "set credentials.WEBHOOK_DESTINATION to its path instead";
    }
    {
      change.webhookDestination = "https://relay:hunter2@localhost/hook";
      message = "set credentials.WEBHOOK_DESTINATION to its path instead";
    }
    {
      change.natsAddress = [
        "nats://localhost"
        "nats://relay:hunter2@localhost"
      ];
      message = "set credentials.NATS_HOST to its path instead";
    }
    {
      change.natsAddress = "hunter2@localhost";
      message = "set credentials.NATS_HOST to its path instead";
    }
    {
      change.settings.HTTPS_PROXY = "relay:hunter2@proxy:3128";
      message = "set credentials.HTTPS_PROXY to its path instead";
    }
    {
      change.settings.HTTP_PROXY = "http://relay:hunter2@proxy:3128\n";
      message = "set credentials.HTTP_PROXY to its path instead";
    }
    {
      change.log = "warning";
      message = "Did you mean `warn`?";
    }
    {
      change.log = "Infoo";
      message = "Did you mean `info`?";
    }
    {
      change.settings.RUST_LOG = "warn,nats-webhook-relay=info";
      message = "Did you mean `nats_webhook_relay=info`?";
    }
    {
      change.log = "nats_webhook_relay=loud";
      message = "`nats_webhook_relay=loud` is neither a level (off, error, ";
    }
    {
      change.log = "verbose";
      message = "`verbose` is neither a level";
    }
    {
      change.log = "info,loud::module=debug";
      message = "nor a module that logs";
    }
    {
      change.log = "reqwest=debug,hyper/x";
      message = "Write `info,reqwest=debug,hyper/x`";
    }
    {
      change.settings = {
        NATS_STREAM = "CMS";
        NATS_CONSUMER = "relay";
      };
      change.instances.hub = minimal // {
        settings = {
          NATS_STREAM = "CMS";
          NATS_CONSUMER = "relay";
          NATS_JS_DOMAIN = "hub";
        };
      };
      message = "republish the same messages under the same prefix";
    }
    {
      change.instances.preview = minimal // {
        webhookDestination = "http://localhost:4000/hook";
      };
      message = "republish the same messages under the same prefix";
    }
    {
      change.instances.preview = minimal // {
        natsRelayedSubjectPrefix = "relayed.cache.preview";
      };
      message = "Give each relay a natsRelayedSubjectPrefix of its own";
    }
    {
      change = {
        settings.STATUS_LISTEN = "127.0.0.1:9642";
        instances.preview = preview // {
          settings.STATUS_LISTEN = "127.0.0.1:9642";
        };
      };
      message = "can't both listen on 127.0.0.1:9642";
    }
    {
      change = {
        settings.STATUS_LISTEN = "0.0.0.0:9642";
        instances.preview = preview // {
          settings.STATUS_LISTEN = "127.0.0.1:9642";
        };
      };
      message = "with a port of its own";
    }
    {
      change.instances."a b/c" = preview;
      message = "the name of a systemd unit can't hold \"a b/c\"";
    }
    {
      change.instances.preview = { };
      message = "services.nats-webhook-relay.instances.preview.";
    }
  ];

  isRefused =
    { change, message }:
    let
      messages = refused change;
    in
    messages != [ ] && lib.all (lib.hasInfix message) messages;

  full = evaluateWith {
    webhookDestination = [
      "http://localhost/a%20b"
      "http://localhost/c"
    ];
    natsAddress = [
      "nats://a"
      "nats://b"
    ];
    natsUser = "relay";
    natsPasswordFile = "/run/secrets/100%";
    settings = {
      NATS_TLS_FIRST = true;
      SHUTDOWN_TIMEOUT = "1m";
    };
    instances = {
      preview = preview // {
        natsUser = "relay";
        natsPassword = "hunter2";
      };
      off = {
        enable = false;
      };
    };
  };
  inherit (full.systemd) services;
  unnamed = services.nats-webhook-relay;

  failures =
    map (refusal: "accepted, or refused for another reason: ${builtins.toJSON refusal.change}") (
      lib.filter (refusal: !isRefused refusal) refusals
    )
    ++ map (failure: "${failure.name}: ${builtins.toJSON failure.result}") (
      lib.runTests {
        "test a good configuration is accepted" = {
          expr = refused { };
          expected = [ ];
        };
        "test prefixes that only start alike are accepted" = {
          expr = refused { natsRelayedSubjectPrefix = "cms.cached"; };
          expected = [ ];
        };
        "test a file may hold what is required" = {
          expr = refused {
            natsAddress = null;
            credentials.NATS_HOST = "/run/secrets/x";
          };
          expected = [ ];
        };
        "test an environment file may hold anything" = {
          expr = refused {
            natsUser = "relay";
            webhookDestination = null;
            environmentFiles = [ "/run/secrets/x" ];
          };
          expected = [ ];
        };
        "test a path with an @ is no login" = {
          expr = refused { webhookDestination = "http://localhost/@editor/hook"; };
          expected = [ ];
        };
        "test what the program takes as a log filter is accepted" = {
          expr = lib.concatMap (log: refused { inherit log; }) [
            "DEBUG"
            "info, nats_webhook_relay=Trace,async_nats::connector=off,hyper=,/published"
            "async_nats,nats_webhook_relay::webhook/a,b=c"
            "error,tokio"
            ""
          ];
          expected = [ ];
        };
        "test certificates may be in the store, a proxy with a login in a file" = {
          expr = refused {
            settings = {
              SSL_CERT_FILE = "${pkgs.writeText "ca" "ca"}";
              WEBHOOK_CA = "${pkgs.writeText "ca" "ca"}";
              WEBHOOK_CERT = "${pkgs.writeText "certificate" "certificate"}";
              HTTP_PROXY = "http://proxy:3128";
              NO_PROXY = "localhost,.internal";
            };
            credentials.HTTPS_PROXY = "/run/secrets/proxy";
          };
          expected = [ ];
        };
        "test replicas and lanes may share the relayed prefix, and all any free port" = {
          expr = lib.concatMap refused [
            {
              settings = {
                NATS_QUEUE_GROUP = "relays";
                STATUS_LISTEN = "127.0.0.1:0";
              };
              instances.second = minimal // {
                settings = {
                  NATS_QUEUE_GROUP = "relays";
                  STATUS_LISTEN = "127.0.0.1:0";
                };
              };
            }
            {
              settings = {
                NATS_STREAM = "CMS";
                NATS_CONSUMER = "relay";
              };
              instances.second = minimal // {
                settings = {
                  NATS_STREAM = "CMS";
                  NATS_CONSUMER = "relay";
                };
              };
            }
            {
              natsSubjectPrefix = "lane.0.cms.cache";
              instances."lane-1.b" = minimal // {
                natsSubjectPrefix = "lane.1.cms.cache";
              };
            }
            {
              instances.elsewhere = minimal // {
                natsAddress = "nats://elsewhere";
              };
            }
            {
              instances.other-account = minimal // {
                credentials.NATS_TOKEN = "/run/secrets/token";
              };
            }
          ];
          expected = [ ];
        };
        "test the lanes of the documentation are as many services, each with a consumer of its own" = {
          expr =
            let
              inherit (evaluate { instances = exampleOfPage; }) assertions systemd;
              settingsOf = service: {
                inherit (service.environment) NATS_CONSUMER NATS_STREAM NATS_SUBJECT_PREFIX;
              };
            in
            {
              refused = lib.filter (assertion: !assertion.assertion) assertions;
              services = lib.mapAttrs (_: settingsOf) systemd.services;
            };
          expected = {
            refused = [ ];
            services = lib.listToAttrs (
              map
                (lane: {
                  name = "nats-webhook-relay-${lane}";
                  value = {
                    NATS_CONSUMER = "lane-4-${lane}";
                    NATS_STREAM = "CMS";
                    NATS_SUBJECT_PREFIX = "lanes.4.${lane}.cms.cache";
                  };
                })
                [
                  "0"
                  "1"
                  "2"
                  "3"
                ]
            );
          };
        };
        "test the option has the lanes of docs/growing.md as its example" = {
          expr = exampleOfOption;
          expected = exampleOfPage;
        };
        "test one service for each relay that is enabled" = {
          expr = lib.attrNames services;
          expected = [
            "nats-webhook-relay"
            "nats-webhook-relay-preview"
          ];
        };
        "test only a password in the configuration is warned about" = {
          expr = map (lib.hasPrefix "services.nats-webhook-relay.instances.preview.natsPassword") full.warnings;
          expected = [ true ];
        };
        "test values reach the environment as they are" = {
          expr = unnamed.environment;
          expected = {
            NATS_HOST = "nats://a,nats://b";
            NATS_PASS_FILE = "%d/NATS_PASS";
            NATS_RELAYED_SUBJECT_PREFIX = "relayed.cache";
            NATS_SUBJECT_PREFIX = "cms.cache";
            NATS_TLS_FIRST = "true";
            NATS_USER = "relay";
            RUST_LOG = "info";
            SHUTDOWN_TIMEOUT = "1m";
            WEBHOOK_DESTINATION = "http://localhost/a%%20b http://localhost/c";
          };
        };
        "test systemd reads the credential" = {
          expr = unnamed.serviceConfig.LoadCredential;
          expected = [ "NATS_PASS:/run/secrets/100%%" ];
        };
        "test a key is read by systemd, and the program is told where it is then" = {
          expr =
            let
              service =
                (evaluateWith { credentials.WEBHOOK_KEY = "/run/secrets/key"; })
                .systemd.services.nats-webhook-relay;
            in
            [
              service.serviceConfig.LoadCredential
              service.environment.WEBHOOK_KEY
            ];
          expected = [
            [ "WEBHOOK_KEY:/run/secrets/key" ]
            "%d/WEBHOOK_KEY"
          ];
        };
        "test not even a password in the configuration is in the unit" = {
          expr = lib.hasInfix "hunter2" (
            builtins.toJSON {
              inherit (services.nats-webhook-relay-preview) environment serviceConfig;
            }
          );
          expected = false;
        };
        "test a stop is given the time that the program takes" = {
          expr = unnamed.serviceConfig.TimeoutStopSec;
          expected = "1m 10s";
        };
        "test a user of its own unless one is named" = {
          expr = map (service: service.serviceConfig.DynamicUser) [
            unnamed
            (evaluateWith { user = "relay"; }).systemd.services.nats-webhook-relay
          ];
          expected = [
            true
            false
          ];
        };
      }
    );
in
if failures == [ ] then
  runCommand "module" { } "touch $out"
else
  throw (lib.concatStringsSep "\n" failures)
