# A relay between a real nats-server and a webhook: order, and no leaked password.
{ lib, ... }:
let
  password = "hunter2";
in
{
  name = "nats-webhook-relay-core-mode";

  nodes.machine =
    { pkgs, ... }:
    {
      imports = [ ../module.nix ];

      environment.systemPackages = [ pkgs.natscli ];

      services.nats = {
        enable = true;
        settings = {
          authorization = {
            user = "relay";
            inherit password;
          };
          http = "127.0.0.1:8222";
        };
      };

      systemd.services.webhook = {
        wantedBy = [ "multi-user.target" ];
        serviceConfig.ExecStart = "${lib.getExe pkgs.python3} ${./webhook.py}";
      };

      services.nats-webhook-relay = {
        enable = true;
        webhookDestination = "http://127.0.0.1:3000/hook";
        natsAddress = "nats://127.0.0.1:4222";
        natsUser = "relay";
        natsPasswordFile = "/run/nats-password";
        natsSubjectPrefix = "cms.cache";
        natsRelayedSubjectPrefix = "relayed.cache";
        settings.WEBHOOK_TIMEOUT = "5s";

        instances.misconfigured = {
          webhookDestination = "ftp://127.0.0.1/";
          natsAddress = "nats://127.0.0.1:4222";
          natsSubjectPrefix = "cms.cache";
          natsRelayedSubjectPrefix = "relayed-elsewhere.cache";
          # Not complete when the system is built, which would fail otherwise.
          environmentFiles = [ "-/run/misconfigured" ];
        };
      };

      # The password does not exist before the test writes it.
      systemd.services.nats-webhook-relay.wantedBy = lib.mkForce [ ];
    };

  testScript = ''
    unit = "nats-webhook-relay.service"
    nats = "nats --server nats://127.0.0.1:4222 --user relay --password ${password}"

    machine.wait_for_unit("nats.service")
    machine.wait_for_open_port(4222)
    machine.wait_for_open_port(3000)
    machine.succeed("install -m 0400 /dev/null /run/nats-password")
    machine.succeed("printf %s ${password} > /run/nats-password")

    # Ready means subscribed: nothing published right after the start is lost.
    machine.succeed(
        "systemd-run --unit subscriber --setenv PATH --setenv HOME "
        f"sh -c '{nats} subscribe --count 20 --raw \"relayed.cache.>\" > /run/relayed'"
    )
    machine.wait_until_succeeds(
        "curl -s 'http://127.0.0.1:8222/subsz?subs=1' | grep relayed.cache", 30
    )
    machine.succeed(f"systemctl start {unit}")
    machine.succeed(f"for i in $(seq 20); do {nats} publish cms.cache.page.$i $i; done")

    # In order, through the attempts that the webhook refuses.
    expected = [str(i) for i in range(1, 21)]
    machine.wait_until_succeeds("test $(wc -w < /run/relayed) = 20", 60)
    assert machine.succeed("cat /run/relayed").split() == expected
    assert machine.succeed("cat /run/webhook/accepted").split() == expected
    assert machine.succeed("cat /run/webhook/refused").split() == ["3", "3", "7"]

    # The password is where the service alone can read it.
    pid = machine.succeed(f"systemctl show --value --property MainPID {unit}").strip()
    machine.fail(f"systemctl cat {unit} | grep ${password}")
    machine.fail(f"grep -a ${password} /proc/{pid}/environ")
    machine.fail(f"journalctl --unit {unit} | grep ${password}")
    credential = f"/run/credentials/{unit}/NATS_PASS"
    assert machine.succeed(f"cat {credential}") == "${password}"
    machine.fail(f"runuser -u nobody -- cat {credential}")

    # The current message is finished before the relay stops.
    machine.succeed(f"{nats} publish cms.cache.page.slow slow")
    machine.wait_until_succeeds("test -e /run/webhook/slow", 30)
    machine.succeed(f"systemctl stop {unit}")
    assert machine.succeed("tail -n 1 /run/webhook/accepted").strip() == "slow"
    machine.succeed(f"journalctl --unit {unit} | grep 'relayed.cache.page.slow'")
    assert "Result=success" in machine.succeed(f"systemctl show --property Result {unit}")

    # A bad configuration is not tried again.
    other = "nats-webhook-relay-misconfigured.service"
    machine.wait_until_succeeds(f"systemctl is-failed {other}")
    shown = machine.succeed(f"systemctl show --property ExecMainStatus,NRestarts {other}").split()
    assert sorted(shown) == ["ExecMainStatus=78", "NRestarts=0"], shown
  '';
}
