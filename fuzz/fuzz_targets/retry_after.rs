#![no_main]

use libfuzzer_sys::fuzz_target;
use nats_webhook_relay::fuzzing;

fuzz_target!(|input: (u32, &str)| fuzzing::retry_after(input.1, input.0));
