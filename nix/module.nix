# services.nats-webhook-relay: one systemd service for the options themselves, and one for each of
# `instances`, which has the same options.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;

  # What the program knows; one of its tests compares this file with its own table. The value says
  # how a variable is treated: "plain" and "secret" ones may be given as X_FILE, a "file" is the name
  # of a file already. A name that ends in <NAME> stands for all that start like it.
  variables = lib.importJSON ./variables.json;
  families = lib.filter (lib.hasSuffix "<NAME>") (lib.attrNames variables);
  kindOf =
    variable:
    let
      inFamily = family: builtins.match "${lib.removeSuffix "<NAME>" family}[A-Z0-9_]+" variable != null;
    in
    variables.${lib.findFirst inFamily variable families} or null;
  known = lib.concatStringsSep ", " (lib.attrNames variables);

  # What a log filter may name; the same test compares the crates.
  logCrates = lib.importJSON ./log-crates.json;
  levels = [
    "off"
    "error"
    "warn"
    "info"
    "debug"
    "trace"
  ];

  # Files that anyone may read, unlike those with a key.
  publicFiles = [
    "NATS_CA"
    "NATS_CERT"
    "SSL_CERT_FILE"
    "WEBHOOK_CA"
    "WEBHOOK_CERT"
  ];

  # Variables that hold URLs, each with what stands between two of them.
  urlSeparators = {
    HTTP_PROXY = space;
    HTTPS_PROXY = space;
    NATS_ADDRESS = "[,[:space:]]+";
    NATS_HOST = "[,[:space:]]+";
    WEBHOOK_DESTINATION = space;
  };
  space = "[[:space:]]+";

  # What decides to which server, and to which account there, a relay connects.
  connectionVariables = lib.genAttrs [
    "NATS_ADDRESS"
    "NATS_CREDS"
    "NATS_HOST"
    "NATS_NKEY"
    "NATS_TOKEN"
    "NATS_USER"
  ] (_: null);

  # Whether any of these URLs has a login or a query.
  holdsSecret =
    variable: value:
    lib.any (
      url:
      lib.isString url && (builtins.match "[^/?#]*(//)?[^/?#]*@.*" url != null || lib.hasInfix "?" url)
    ) (builtins.split urlSeparators.${variable} (asText value));

  # Without what is not set. The program takes an empty value as not set, too.
  given = lib.filterAttrs (_: value: value != null && value != "");

  # The options of one relay.
  relayOptions =
    { enabledByDefault }:
    { config, ... }:
    {
      options = {
        enable = mkOption {
          type = types.bool;
          default = enabledByDefault;
          description = "Whether to run this relay.";
        };

        package = mkOption {
          type = types.package;
          default = pkgs.callPackage ./package.nix { };
          defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
          description = "The package that provides the program.";
        };

        user = mkOption {
          type = types.nullOr types.str;
          default = null;
          description = ''
            An existing user to run as. Unless one is named, systemd allocates one while the service
            runs (`DynamicUser`).
          '';
        };

        group = mkOption {
          type = types.nullOr types.str;
          default = null;
          description = "An existing group to run as, instead of the user's own.";
        };

        webhookDestination = mkOption {
          type = types.nullOr (types.either types.str (types.listOf types.str));
          default = null;
          example = "http://localhost:3000/api/cache/webhook";
          description = ''
            URL that each message is POSTed to; with a list, every one of them must succeed. A URL
            that holds a secret belongs in `credentials.WEBHOOK_DESTINATION` instead.
          '';
        };

        natsAddress = mkOption {
          type = types.nullOr (types.either types.str (types.listOf types.str));
          default = null;
          example = "nats://localhost:4222";
          description = "`nats://`, `tls://`, `ws://` or `wss://` URL of the NATS server; a list for those of a cluster.";
        };

        natsUser = mkOption {
          type = types.nullOr types.str;
          default = null;
          description = "NATS user, if the server asks for one.";
        };

        natsPassword = mkOption {
          type = types.nullOr types.str;
          default = null;
          description = ''
            Password of the NATS user. It lands in the Nix store, where everyone can read it: use
            `natsPasswordFile` instead.
          '';
        };

        natsPasswordFile = mkOption {
          type = types.nullOr types.path;
          default = null;
          example = "/run/secrets/nats-password";
          description = ''
            File with the password of the NATS user. Only root needs to be able to read it: systemd
            hands it to the service.
          '';
        };

        natsSubjectPrefix = mkOption {
          type = types.nullOr types.str;
          default = null;
          example = "cms.cache";
          description = "Messages on every subject below this prefix are relayed.";
        };

        natsRelayedSubjectPrefix = mkOption {
          type = types.nullOr types.str;
          default = null;
          example = "relayed.cache";
          description = ''
            Messages are republished under this prefix. Each environment (production, preview, a
            laptop) needs its own.
          '';
        };

        log = mkOption {
          type = types.str;
          default = "info";
          example = "debug";
          description = "What is logged: `error`, `warn`, `info`, `debug`, `trace`, or an env_logger filter.";
        };

        settings = mkOption {
          type = types.attrsOf (
            types.oneOf [
              types.bool
              types.int
              types.str
              types.path
            ]
          );
          default = { };
          example = {
            WEBHOOK_TIMEOUT = "5s";
            WEBHOOK_MAX_ATTEMPTS = 0;
          };
          description = ''
            Any environment variable that the program knows; `nats-webhook-relay --help` lists them.
            Everyone on the host can read these values: secrets belong in `credentials`.
          '';
        };

        credentials = mkOption {
          type = types.attrsOf types.path;
          default = { };
          example.NATS_PASS = "/run/secrets/nats-password";
          description = ''
            Variables whose values are secret, each with a file that holds the value. Only root
            needs to be able to read it: systemd hands it to the service, and the value appears
            neither in the unit nor in the environment.
          '';
        };

        environmentFiles = mkOption {
          type = types.listOf types.path;
          default = [ ];
          example = [ "/run/secrets/relay.env" ];
          description = ''
            Files with lines `NAME=value` that systemd adds to the environment. For secrets
            `credentials` is better: a process's environment is seen by all that its user runs.
          '';
        };
      };

      # Most options are another way to write one of `settings` or `credentials`.
      config = {
        settings = given {
          NATS_HOST = joined "," config.natsAddress;
          NATS_RELAYED_SUBJECT_PREFIX = config.natsRelayedSubjectPrefix;
          NATS_SUBJECT_PREFIX = config.natsSubjectPrefix;
          NATS_USER = config.natsUser;
          RUST_LOG = lib.mkDefault config.log;
          WEBHOOK_DESTINATION = joined " " config.webhookDestination;
        };
        credentials = given { NATS_PASS = config.natsPasswordFile; };
      };
    };

  joined = separator: value: if lib.isList value then lib.concatStringsSep separator value else value;

  # The options that must be set, each with the variables that do as well.
  required = {
    natsAddress = [
      "NATS_HOST"
      "NATS_ADDRESS"
    ];
    natsRelayedSubjectPrefix = [ "NATS_RELAYED_SUBJECT_PREFIX" ];
    natsSubjectPrefix = [ "NATS_SUBJECT_PREFIX" ];
    webhookDestination = [ "WEBHOOK_DESTINATION" ];
  };

  # A value as the environment has it. A path written without quotes is a file to copy to the store.
  asText =
    value:
    if builtins.isPath value then
      "${value}"
    else if lib.isBool value then
      lib.boolToString value
    else
      toString value;

  inStore = path: lib.hasPrefix builtins.storeDir (toString path);

  moveOut =
    "is in the Nix store, where everyone can read it. Put the file elsewhere, and write its path in "
    + "quotes, such as \"/run/secrets/name\".";

  # What is wrong with a log filter. The program refuses the same: a word that is no level is taken for
  # a module, of which everything is logged, and nothing of any other.
  logFaults =
    filter:
    let
      directives = lib.filter (directive: directive != "") (
        map lib.trim (lib.splitString "," (lib.head (lib.splitString "/" filter)))
      );
      parts = directive: map lib.trim (lib.splitString "=" directive);
      isLevel = word: lib.elem (lib.toLower word) levels;
      # env_logger compares only how a name begins.
      names =
        crate: directive:
        let
          module = lib.head (parts directive);
        in
        lib.hasPrefix "${crate}::" module || lib.hasPrefix module crate;
      isKnown =
        directive:
        isLevel directive
        || (
          lib.any (crate: names crate directive) logCrates
          && lib.all (level: level == "" || isLevel level) (lib.tail (parts directive))
        );
      isLike =
        word: level:
        lib.hasPrefix word level || lib.hasPrefix level word || lib.strings.levenshteinAtMost 1 word level;
      meant =
        directive:
        lib.filter isKnown [ (lib.replaceStrings [ "-" ] [ "_" ] directive) ]
        ++ lib.filter (isLike (lib.toLower directive)) levels;
      unknown = lib.filter (directive: !isKnown directive) directives;
      tellsOfMessages = directive: isLevel directive || names "nats_webhook_relay" directive;
    in
    map (
      directive:
      "`${directive}` is neither a level (${lib.concatStringsSep ", " levels}) nor a module that logs, "
      + "such as nats_webhook_relay=debug."
      + lib.optionalString (meant directive != [ ]) " Did you mean `${lib.head (meant directive)}`?"
    ) unknown
    ++ lib.optional (unknown == [ ] && directives != [ ] && !lib.any tellsOfMessages directives) (
      "`${filter}` would silence the relay's own log. Write `info,${filter}`."
    );

  overlap = a: b: lib.hasPrefix "${a}." "${b}." || lib.hasPrefix "${b}." "${a}.";

  # Whether two addresses can't both be listened on. Port 0 is any that is free.
  clash =
    a: b:
    let
      port = address: lib.last (lib.splitString ":" address);
      isEverywhere = address: lib.hasPrefix "0.0.0.0:" address || lib.hasPrefix "[::]:" address;
    in
    port a == port b && port a != "0" && (a == b || isEverywhere a || isEverywhere b);

  # systemd replaces %d and the like in what a unit says.
  literally = lib.replaceStrings [ "%" ] [ "%%" ];

  scopeOf =
    name: "services.nats-webhook-relay" + lib.optionalString (name != null) ".instances.${name}";

  # From the options of one relay to what they add to the system.
  relay =
    name: cfg:
    let
      scope = scopeOf name;

      # The password is no secret any more, but even so it stays out of the unit.
      storedPassword = lib.mapAttrs (_: pkgs.writeText "nats-password") (given {
        NATS_PASS = cfg.natsPassword;
      });
      credentials = cfg.credentials // storedPassword;
      has = variable: cfg.settings ? ${variable} || credentials ? ${variable};
      # Environment files are read only when the service starts, and may hold any variable.
      complete = cfg.environmentFiles == [ ];

      # One assertion for each of `subjects`, a name below the scope → whether that is wrong.
      refuse =
        wrong: message: subjects:
        map (subject: {
          assertion = !wrong subject;
          message = "${scope}.${message subject}";
        }) subjects;
      settings = lib.attrNames cfg.settings;
      secrets = lib.attrNames cfg.credentials;
      prefixes = lib.filter (
        variable: lib.hasPrefix "NATS_" variable && lib.hasSuffix "_PREFIX" variable
      ) settings;
    in
    {
      assertions = lib.concatLists [
        (refuse (variable: kindOf variable == null) (
          variable:
          "settings.${variable}: there is no such variable. Known are ${known}; for one of their "
          + "_FILE forms use `credentials`."
        ) settings)
        (refuse (variable: kindOf variable == null) (
          variable: "credentials.${variable}: there is no such variable. Known are ${known}."
        ) secrets)
        (refuse (variable: kindOf variable == "secret") (
          variable:
          "settings.${variable} is secret, but everyone could read it there. Put the value into a "
          + "file outside of the Nix store, and set credentials.${variable} to its path."
        ) settings)
        (refuse (variable: urlSeparators ? ${variable} && holdsSecret variable cfg.settings.${variable}) (
          variable:
          "settings.${variable} holds a URL with a login or a query, and everyone could read it there. "
          + "Put the whole value into a file outside of the Nix store, and set credentials.${variable} "
          + "to its path instead."
        ) settings)
        (refuse (_: true) (fault: "settings.RUST_LOG (log): ${fault}") (
          logFaults (asText cfg.settings.RUST_LOG)
        ))
        (refuse (variable: cfg.settings ? ${variable}) (
          variable: "credentials.${variable} is set, and so is settings.${variable}. Keep one of them."
        ) secrets)
        (refuse (variable: cfg.credentials ? ${variable}) (
          _: "natsPassword is set, and so is the password's file. Keep natsPasswordFile."
        ) (lib.attrNames storedPassword))
        (refuse (variable: inStore cfg.credentials.${variable}) (
          variable: "credentials.${variable} ${moveOut}"
        ) secrets)
        (refuse (
          variable:
          kindOf variable == "file"
          && !lib.elem variable publicFiles
          && inStore (asText cfg.settings.${variable})
        ) (variable: "settings.${variable} ${moveOut}") settings)
        (refuse inStore (path: "environmentFiles: ${baseNameOf path} ${moveOut}") cfg.environmentFiles)
        (refuse (option: complete && !lib.any has required.${option}) (
          option: "${option} is not set. The relay can't run without it."
        ) (lib.attrNames required))
        (refuse (_: complete && has "NATS_USER" != has "NATS_PASS") (
          _: "natsUser and natsPasswordFile belong together. Set both or neither."
        ) [ null ])
        (refuse (pair: pair.a < pair.b && overlap cfg.settings.${pair.a} cfg.settings.${pair.b})
          (
            pair:
            "settings: ${pair.a} (${cfg.settings.${pair.a}}) and ${pair.b} (${cfg.settings.${pair.b}}) "
            + "overlap, so that the relay would take one message for another. Choose prefixes of which none "
            + "is below the other."
          )
          (
            lib.cartesianProduct {
              a = prefixes;
              b = prefixes;
            }
          )
        )
      ];

      warnings = lib.optional (storedPassword != { }) (
        "${scope}.natsPassword lands in the Nix store, where everyone can read it. Put the password "
        + "into a file outside of the store, and set natsPasswordFile to its path."
      );

      systemd.services."nats-webhook-relay${lib.optionalString (name != null) "-${name}"}" = {
        description = "Relay from NATS to a webhook" + lib.optionalString (name != null) " (${name})";
        wantedBy = [ "multi-user.target" ];
        wants = [ "network-online.target" ];
        # After the NATS server, where it runs on this host: then the relay is stopped before it,
        # and can still republish the current message.
        after = [
          "network-online.target"
          "nats.service"
        ];
        # Trying again never hurts.
        startLimitIntervalSec = 0;

        environment =
          lib.mapAttrs (_: value: literally (asText value)) cfg.settings
          // lib.mapAttrs' (
            variable: _:
            lib.nameValuePair (
              variable + lib.optionalString (kindOf variable != "file") "_FILE"
            ) "%d/${variable}"
          ) credentials;

        serviceConfig =
          import ./hardening.nix
          // given {
            User = cfg.user;
            Group = cfg.group;
          }
          // {
            DynamicUser = cfg.user == null;
            # Ready means subscribed, or that NATS has been waited for for 10 s.
            Type = "notify";
            ExecStart = lib.getExe cfg.package;
            LoadCredential = lib.mapAttrsToList (
              variable: path: "${variable}:${literally (toString path)}"
            ) credentials;
            EnvironmentFile = map (path: literally (toString path)) cfg.environmentFiles;
            Restart = "on-failure";
            RestartSec = 5;
            # A bad configuration does not get better.
            RestartPreventExitStatus = 78;
            WatchdogSec = 30;
            # The program ends by itself within the first; systemd adds the two up.
            TimeoutStopSec = "${cfg.settings.SHUTDOWN_TIMEOUT or "20s"} 10s";
          };
      };
    };

  top = config.services.nats-webhook-relay;
  relays = lib.filter (relay: relay.cfg.enable) (
    [
      {
        name = null;
        cfg = top;
      }
    ]
    ++ lib.mapAttrsToList (name: cfg: { inherit name cfg; }) top.instances
  );
  system = map ({ name, cfg }: relay name cfg) relays;

  # Each two of them.
  pairs = lib.concatLists (
    lib.imap1 (index: a: map (b: { inherit a b; }) (lib.drop index relays)) relays
  );

  # What each relay is right about by itself may be wrong beside the others.
  assertions =
    lib.concatMap (relay: relay.assertions) system
    ++ map (
      { name, ... }:
      {
        assertion = name == null || builtins.match "[A-Za-z0-9_.-]+" name != null;
        message =
          "services.nats-webhook-relay.instances: the name of a systemd unit can't hold "
          + "${builtins.toJSON name}. Use letters, digits, `_`, `.` and `-` only.";
      }
    ) relays
    ++ lib.concatMap (
      { a, b }:
      let
        both = "${scopeOf a.name} and ${scopeOf b.name}";
        agree =
          test: name:
          a.cfg.settings ? ${name}
          && b.cfg.settings ? ${name}
          && test a.cfg.settings.${name} b.cfg.settings.${name};
        same = agree (a: b: a == b);

        # Another login may be another account, where the same subject is another one.
        connection =
          { cfg, ... }: builtins.intersectAttrs connectionVariables (cfg.credentials // cfg.settings);
        relayTheSame =
          connection a != { }
          && connection a == connection b
          && agree overlap "NATS_SUBJECT_PREFIX"
          && agree overlap "NATS_RELAYED_SUBJECT_PREFIX";
        # The same stream in another domain is another one.
        domainOf = { cfg, ... }: cfg.settings.NATS_JS_DOMAIN or null;
        takeTurns =
          same "NATS_QUEUE_GROUP" || same "NATS_STREAM" && same "NATS_CONSUMER" && domainOf a == domainOf b;
      in
      [
        {
          assertion = relayTheSame -> takeTurns;
          message =
            "${both} republish the same messages under the same prefix, so that browsers would hear "
            + "of a change before their own server has. Give each relay a natsRelayedSubjectPrefix "
            + "of its own; replicas need the same settings.NATS_QUEUE_GROUP, or the same "
            + "settings.NATS_STREAM and settings.NATS_CONSUMER.";
        }
        {
          assertion = !agree clash "STATUS_LISTEN";
          message =
            "${both} can't both listen on ${b.cfg.settings.STATUS_LISTEN}. Give each a "
            + "settings.STATUS_LISTEN with a port of its own.";
        }
      ]
    ) pairs;
in
{
  options.services.nats-webhook-relay = mkOption {
    type = types.submodule [
      (relayOptions { enabledByDefault = false; })
      {
        options.instances = mkOption {
          type = types.attrsOf (
            types.submodule (relayOptions {
              enabledByDefault = true;
            })
          );
          default = { };
          example = lib.literalExpression ''
            lib.genAttrs [ "0" "1" "2" "3" ] (lane: {
              webhookDestination = "http://localhost:3000/api/cache/webhook";
              natsAddress = "nats://localhost:4222";
              natsSubjectPrefix = "lanes.4.''${lane}.cms.cache";
              natsRelayedSubjectPrefix = "relayed.cache";
              settings.NATS_STREAM = "CMS";
              settings.NATS_CONSUMER = "lane-4-''${lane}";
            })
          '';
          description = ''
            Further relays on this host, by name. Each has the options of the unnamed one and a
            service of its own, `nats-webhook-relay-<name>.service`. The example is four lanes: relays
            between which NATS divides the messages (see docs/growing.md).
          '';
        };
      }
    ];
    default = { };
    description = "Relays from NATS to a webhook.";
  };

  config = {
    inherit assertions;
    warnings = lib.concatMap (relay: relay.warnings) system;
    systemd.services = lib.mkMerge (map (relay: relay.systemd.services) system);
  };
}
