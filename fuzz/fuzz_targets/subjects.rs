#![no_main]

use libfuzzer_sys::fuzz_target;
use nats_webhook_relay::fuzzing;

fuzz_target!(|input: (&str, &str, &str, &str)| fuzzing::subjects(
    input.0, input.1, input.2, input.3
));
