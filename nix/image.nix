# An OCI image with nothing but the program and the certificate authorities.
{
  lib,
  cacert,
  dockerTools,
  nats-webhook-relay,
}:
dockerTools.buildLayeredImage {
  name = nats-webhook-relay.pname;
  tag = nats-webhook-relay.version;
  config = {
    Entrypoint = [ (lib.getExe nats-webhook-relay) ];
    Env = [ "SSL_CERT_FILE=${cacert}/etc/ssl/certs/ca-bundle.crt" ];
    Labels = {
      "org.opencontainers.image.source" = nats-webhook-relay.meta.homepage;
      "org.opencontainers.image.description" = nats-webhook-relay.meta.description;
      "org.opencontainers.image.version" = nats-webhook-relay.version;
      "org.opencontainers.image.licenses" = nats-webhook-relay.meta.license.spdxId;
    };
    # Not root, and by number: there is no /etc/passwd, and Kubernetes can check a number.
    User = "65532:65532";
  };
}
