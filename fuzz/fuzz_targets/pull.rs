#![no_main]

use libfuzzer_sys::fuzz_target;
use nats_webhook_relay::fuzzing;

fuzz_target!(|input: (&str, Option<String>, u16, &str)| fuzzing::pull(
    input.0, input.1, input.2, input.3
));
