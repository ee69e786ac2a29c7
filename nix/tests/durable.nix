# Two relays on one durable consumer: when one is stopped, the other goes on, and nothing is lost or
# out of order.
{ lib, pkgs, ... }:
let
  relay = {
    enable = true;
    webhookDestination = "http://127.0.0.1:3000/hook";
    natsAddress = "nats://127.0.0.1:4222";
    natsSubjectPrefix = "cms.cache";
    natsRelayedSubjectPrefix = "relayed.cache";
    settings = {
      NATS_STREAM = "CMS";
      NATS_CONSUMER = "relay";
    };
  };
in
{
  name = "nats-webhook-relay-durable-mode";

  nodes.machine = {
    imports = [ ../module.nix ];

    environment.systemPackages = [
      pkgs.jq
      pkgs.natscli
    ];

    services.nats = {
      enable = true;
      jetstream = true;
    };

    systemd.services.webhook = {
      wantedBy = [ "multi-user.target" ];
      serviceConfig.ExecStart = "${lib.getExe pkgs.python3} ${./webhook.py}";
    };

    services.nats-webhook-relay = {
      instances = {
        one = relay;
        two = relay;
      };
    };

    # A relay needs the stream, which the test creates.
    systemd.services.nats-webhook-relay-one.wantedBy = lib.mkForce [ ];
    systemd.services.nats-webhook-relay-two.wantedBy = lib.mkForce [ ];
  };

  testScript = ''
    nats = "nats --server nats://127.0.0.1:4222"


    def publish(numbers):
        machine.succeed(
            f"for i in {' '.join(map(str, numbers))}; do {nats} publish cms.cache.page.$i $i; done"
        )


    def wait_for_relayed(count):
        machine.wait_until_succeeds(f"test $(wc -l < /run/webhook/accepted) = {count}", 60)


    machine.wait_for_unit("nats.service")
    machine.wait_for_open_port(4222)
    machine.wait_for_open_port(3000)
    for stream, subject in {"CMS": "cms.cache.>", "RELAYED": "relayed.cache.>"}.items():
        machine.succeed(f"{nats} stream add {stream} --subjects '{subject}' --defaults")
    machine.succeed("systemctl start nats-webhook-relay-one nats-webhook-relay-two")

    publish(range(1, 21))
    wait_for_relayed(20)

    # One is stopped while it works on a message, its own or the other's: it is finished, and the other
    # takes what follows.
    machine.succeed(f"{nats} publish cms.cache.page.slow slow")
    machine.wait_until_succeeds("test -e /run/webhook/slow", 30)
    publish(range(21, 31))
    machine.succeed("systemctl stop nats-webhook-relay-one")
    wait_for_relayed(31)

    # What is published while no relay runs is relayed later.
    machine.succeed("systemctl stop nats-webhook-relay-two")
    publish(range(31, 41))
    machine.succeed("systemctl start nats-webhook-relay-one")
    wait_for_relayed(41)

    expected = [*map(str, range(1, 21)), "slow", *map(str, range(21, 41))]
    assert machine.succeed("cat /run/webhook/accepted").split() == expected

    # Each was republished once, in the same order.
    machine.wait_until_succeeds(
        f"test $({nats} stream info RELAYED --json | jq .state.messages) = 41", 30
    )
    for sequence, payload in enumerate(expected, start=1):
        message = machine.succeed(f"{nats} stream get RELAYED {sequence}")
        assert f"relayed.cache.page.{payload}" in message.split(), message
  '';
}
