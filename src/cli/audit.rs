//! `audit`: who did what.

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Error, open, print, print_table};
use crate::{
    config::DatabaseArgs,
    store::{AuditAction, AuditEntry, AuditFilter},
    webhook::Environment,
};

/// Arguments of `audit`.
#[derive(Args)]
pub(super) struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Subcommand)]
enum AuditCommand {
    /// List what was done to keys, webhooks, secrets and deliveries, the newest first
    List(ListArgs),
}

#[derive(Args)]
struct ListArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Only what concerns this organization
    #[arg(long, value_name = "NAME")]
    organization: Option<String>,
    /// Only what concerns this environment: live or test
    #[arg(long, value_name = "NAME", value_parser = environment)]
    environment: Option<Environment>,
    /// Only this action, such as secret_rotated
    #[arg(long, value_name = "ACTION", value_parser = action)]
    action: Option<AuditAction>,
    /// Only what this key did, `key_…`, or `cli`
    #[arg(long, value_name = "ID")]
    actor: Option<String>,
    /// Only what was done to this very key, webhook, delivery or master key
    #[arg(long, value_name = "ID")]
    resource: Option<String>,
    /// Only what concerns this webhook: itself, its secret, its deliveries
    #[arg(long, value_name = "ID")]
    webhook: Option<String>,
    /// How many entries at most; 1 to 1000
    #[arg(long, value_name = "COUNT", default_value = "50", value_parser = clap::value_parser!(u64).range(1..=1000))]
    limit: u64,
    /// Go on after this entry, `aud_…`, the last one of the page before
    #[arg(long, value_name = "ID")]
    after: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

impl AuditArgs {
    pub(super) async fn run(self) -> Result<(), Error> {
        let AuditCommand::List(args) = self.command;
        list(args).await
    }
}

async fn list(args: ListArgs) -> Result<(), Error> {
    let store = open(args.database).await?;
    store.expect_schema().await?;
    let filter = AuditFilter {
        organization: args.organization,
        environment: args.environment,
        action: args.action,
        actor: args.actor,
        resource_id: args.resource,
        webhook_id: args.webhook,
    };
    let page = store.list_audit(&filter, args.after.as_deref(), args.limit).await?;
    if args.json {
        for entry in &page.items {
            print(describe(entry))?;
        }
    } else if page.total == 0 {
        eprintln!("There is no such entry.");
    } else {
        let header = ["ID", "TIME", "ACTION", "ACTOR", "ORGANIZATION", "ENVIRONMENT", "RESOURCE", "CHANGED", "REQUEST"];
        print_table(header, page.items.iter().map(row))?;
    }
    if let Some(last) = page.items.last().filter(|_| page.more) {
        eprintln!("{} in all; the next page: --after {}", page.total, last.id);
    }
    Ok(())
}

fn environment(word: &str) -> Result<Environment, String> {
    Environment::parse(word).ok_or_else(|| "must be live or test".to_owned())
}

fn action(word: &str) -> Result<AuditAction, String> {
    let known = || AuditAction::ALL.map(AuditAction::as_str).join(", ");
    AuditAction::parse(word).ok_or_else(|| format!("must be one of {}", known()))
}

fn row(entry: &AuditEntry) -> [String; 9] {
    let or_none = |text: Option<&str>| text.unwrap_or("-").to_owned();
    [
        entry.id.clone(),
        entry.occurred_at.to_string(),
        entry.action.as_str().to_owned(),
        entry.actor.clone(),
        or_none(entry.organization.as_deref()),
        or_none(entry.environment.map(Environment::as_str)),
        entry.resource_id.clone(),
        or_none(Some(entry.changed_fields.join(",").as_str()).filter(|names| !names.is_empty())),
        or_none(entry.request_id.as_deref()),
    ]
}

fn describe(entry: &AuditEntry) -> serde_json::Value {
    let mut object = json!({
        "id": entry.id,
        "action": entry.action.as_str(),
        "actor": entry.actor,
        "resourceId": entry.resource_id,
        "occurredAt": entry.occurred_at.to_string(),
    });
    for (name, value) in [
        ("organization", entry.organization.as_deref()),
        ("environment", entry.environment.map(Environment::as_str)),
        ("webhookId", entry.webhook_id.as_deref()),
        ("requestId", entry.request_id.as_deref()),
    ] {
        if let Some(value) = value {
            object[name] = json!(value);
        }
    }
    if !entry.changed_fields.is_empty() {
        object["changedFields"] = json!(entry.changed_fields);
    }
    object
}
