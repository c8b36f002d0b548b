//! The whole service through its doors: real sockets, real SQLite, real PostgreSQL.

mod support;

mod architecture;
mod auditing;
mod backlog;
mod canaries;
mod command_line;
mod crashing;
mod delivering;
mod documented_examples;
mod egress_namespace;
mod errors;
mod fairness;
mod few_files;
mod forgetting;
mod fuzz_corpus;
mod hostile_clients;
mod hostile_receivers;
mod idempotency;
mod interop;
mod isolation;
mod listing;
mod many_nodes;
mod many_webhooks;
mod publishing_many;
mod rate_limiting;
mod rest_layer;
mod retention;
mod sealed_secrets;
mod several_nodes;
mod silent_database;
mod tenants;
mod test_events;
mod tls;
mod transport;
mod watching;
