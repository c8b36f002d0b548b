#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shortkit_webhooks_fuzz::entry::event_data(data));
