# services.nats-webhook-relay: one systemd service for the options themselves, and one for each of
# `instances`, which has the same options. The program checks the values: when the system is built,
# if no file from outside of the store is needed for that, or else when the service starts.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;

  # "plain" or "secret", or "file" for a variable that names a file itself. One of the program's
  # tests compares this with its own table.
  variables = lib.importJSON ./variables.json;
  kindOf =
    variable:
    variables.${
      if lib.hasPrefix "WEBHOOK_HEADER_" variable then "WEBHOOK_HEADER_<NAME>" else variable
    } or null;

  # The program treats "" as unset, too.
  given = lib.filterAttrs (_: value: value != null && value != "");
  asText = value: if lib.isStringLike value then "${value}" else builtins.toJSON value;
  # systemd replaces %d and the like in a unit.
  literally = lib.replaceStrings [ "%" ] [ "%%" ];

  optionOf =
    type: example: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit example description;
    };
  text = optionOf types.str;

  relayOptions =
    { enabledByDefault }:
    { config, ... }:
    {
      options = {
        enable = lib.mkEnableOption "this relay" // {
          default = enabledByDefault;
        };
        package = lib.mkPackageOption packages "nats-webhook-relay" {
          pkgsText = "nats-webhook-relay.packages.\${system}";
        };
        user = text "relay" "An existing user to run as. By default systemd allocates one.";
        group = text "relay" "An existing group to run as, instead of the user's own.";

        webhookDestination = text "http://localhost:3000" "URLs to POST to, separated by spaces.";
        natsAddress = text "nats://localhost:4222" "URLs of the NATS servers, separated by commas.";
        natsUser = text "relay" "NATS user, if the server asks for one.";
        natsPassword = text "secret" "Its password, world-readable in the Nix store.";
        natsPasswordFile = optionOf types.externalPath "/run/secrets/nats" "Its password's file.";
        natsSubjectPrefix = text "cms.cache" "Messages on every subject below it are relayed.";
        natsRelayedSubjectPrefix = text "relayed.cache" "Messages are republished under it.";
        log = text "debug" "What is logged: the same as `settings.RUST_LOG`.";

        settings = mkOption {
          type = with types; attrsOf (nullOr (either (either bool int) (either path str)));
          default = { };
          example.WEBHOOK_TIMEOUT = "5s";
          description = "Variables of the program, for everyone to read. `null` leaves one unset.";
        };
        credentials = mkOption {
          type = types.attrsOf types.externalPath;
          default = { };
          example.NATS_TOKEN = "/run/secrets/nats-token";
          description = "Secret variables, each with the file of its value, readable by root.";
        };
        environmentFiles = mkOption {
          type = with types; listOf (either externalPath (strMatching "-/.*"));
          default = [ ];
          example = [ "-/run/secrets/relay.env" ];
          description = "Files with lines `NAME=value`. One that begins with `-` may be missing.";
        };
        after = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "nextjs.service" ];
          description = ''
            Units on this host that must outlive the relay, such as the front end: were it stopped
            first, each shutdown would cost the current message.
          '';
        };
      };

      config = {
        settings = given {
          NATS_HOST = config.natsAddress;
          NATS_RELAYED_SUBJECT_PREFIX = config.natsRelayedSubjectPrefix;
          NATS_SUBJECT_PREFIX = config.natsSubjectPrefix;
          NATS_USER = config.natsUser;
          RUST_LOG = config.log;
          WEBHOOK_DESTINATION = config.webhookDestination;
        };
        credentials = given { NATS_PASS = config.natsPasswordFile; };
      };
    };
  packages.nats-webhook-relay = pkgs.callPackage ./package.nix { };

  service =
    name: cfg:
    let
      settings = { RUST_LOG = "info"; } // given cfg.settings;
      # Even a password in the store stays out of the unit.
      stored = given { NATS_PASS = cfg.natsPassword; };
      credentials = lib.mapAttrs (_: pkgs.writeText "nats-password") stored // cfg.credentials;
      fileOf = variable: variable + lib.optionalString (kindOf variable != "file") "_FILE";
    in
    {
      description = "Relay from NATS to a webhook";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ];
      # Stop it before a NATS server on this host, so that it can still republish the current message.
      after = [
        "network-online.target"
        "nats.service"
      ]
      ++ cfg.after;
      # Restart without limit.
      startLimitIntervalSec = 0;
      environment =
        lib.mapAttrs (_: value: literally (asText value)) settings
        // lib.mapAttrs' (name: _: lib.nameValuePair (fileOf name) "%d/${name}") credentials;
      serviceConfig = {
        # Ready means subscribed, or that the relay has waited 10 s for NATS.
        Type = "notify";
        ExecStart = lib.getExe cfg.package;
        DynamicUser = cfg.user == null;
        LoadCredential = lib.mapAttrsToList (name: path: literally "${name}:${path}") credentials;
        EnvironmentFile = map literally cfg.environmentFiles;
        # An empty directory, because the program reads .env from its working directory.
        RuntimeDirectory = name;
        WorkingDirectory = "%t/${name}";
        Restart = "on-failure";
        # Wait 5 s before the first restart, and longer each time up to 30 s, as for a refused login.
        RestartSec = 5;
        RestartSteps = 5;
        RestartMaxDelaySec = 30;
        # Restarting does not help with a bad configuration.
        RestartPreventExitStatus = 78;
        WatchdogSec = 30;
        # The program ends by itself within the first; systemd adds the two up.
        TimeoutStopSec = "${asText settings.SHUTDOWN_TIMEOUT or "20s"} 10s";
      }
      // given {
        User = cfg.user;
        Group = cfg.group;
      }
      // import ./hardening.nix;
    };

  # Mistakes that the program cannot see.
  assertions =
    name: cfg:
    map (variable: {
      assertion = kindOf variable != null;
      message = "${name}: the program has no variable ${variable}.";
    }) (lib.attrNames (given cfg.settings // cfg.credentials))
    ++ map (variable: {
      assertion = kindOf variable != "secret";
      message = "${name}: everyone can read settings.${variable}. Use credentials.${variable}.";
    }) (lib.attrNames (given cfg.settings));

  # Has the program check a unit, if nothing that the unit names is outside of the store.
  check =
    name:
    let
      inherit (config.systemd.services.${name}) environment serviceConfig;
      namesFile = variable: kindOf variable == "file" || lib.hasSuffix "_FILE" variable;
      files = lib.attrValues (lib.filterAttrs (variable: _: namesFile variable) environment);
      isComplete =
        serviceConfig.EnvironmentFile == [ ] && lib.all (lib.hasPrefix builtins.storeDir) files;
      settings = lib.mapAttrsToList (variable: value: "${variable}=${value}") environment;
    in
    lib.optional (isComplete && pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) (
      pkgs.runCommand "${name}-settings" { } ''
        env -i ${lib.replaceStrings [ "%%" ] [ "%" ] (lib.escapeShellArgs settings)} \
          ${serviceConfig.ExecStart} --check=config
        touch $out
      ''
    );

  top = config.services.nats-webhook-relay;
  named = lib.mapAttrs' (name: lib.nameValuePair "nats-webhook-relay-${name}") top.instances;
  relays = lib.filterAttrs (_: cfg: cfg.enable) ({ nats-webhook-relay = top; } // named);
  each = f: lib.concatLists (lib.mapAttrsToList f relays);
in
{
  options.services.nats-webhook-relay = mkOption {
    type = types.submodule [
      (relayOptions { enabledByDefault = false; })
      {
        options.instances = mkOption {
          type = types.attrsOf (types.submodule (relayOptions { enabledByDefault = true; }));
          default = { };
          example.preview.webhookDestination = "http://localhost:4000/hook";
          description = "Further relays with these options: `nats-webhook-relay-<name>.service`.";
        };
      }
    ];
    default = { };
    description = "Relays from NATS to a webhook.";
  };

  config = {
    systemd.services = lib.mapAttrs service relays;
    system.checks = each (name: _: check name);
    assertions = each assertions;
    warnings = each (
      name: cfg:
      lib.optional (cfg.natsPassword != null && cfg.natsPassword != "")
        "${name}: everyone can read natsPassword in the Nix store. Set natsPasswordFile to a file."
    );
  };
}
