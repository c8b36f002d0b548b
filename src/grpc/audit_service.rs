//! `AuditService`.

use tonic::{Request, Response, Status};

use super::{Api, convert, proto, status, tenant, token::Purpose, validate};
use crate::store::{AuditAction, AuditFilter};

#[tonic::async_trait]
impl proto::audit_service_server::AuditService for Api {
    async fn list_audit_entries(
        &self,
        request: Request<proto::ListAuditEntriesRequest>,
    ) -> Result<Response<proto::ListAuditEntriesResponse>, Status> {
        let tenant = tenant(&request)?;
        let request = request.into_inner();
        let limit = validate::limit(request.limit)?;
        let action = validate::audit_action(request.action)?;
        if let Some(id) = &request.webhook_id {
            validate::id_filter("webhook_id", id)?;
        }
        let parts = [action.map_or("", AuditAction::as_str), request.webhook_id.as_deref().unwrap_or_default()];
        let purpose = Purpose { call: "audit", tenant: &tenant, filter: &parts };
        let after = self.cursor(&purpose, request.cursor.as_deref())?;
        let filter = AuditFilter {
            organization: Some(tenant.organization().to_owned()),
            environment: Some(tenant.environment()),
            action,
            webhook_id: request.webhook_id.clone(),
            ..AuditFilter::default()
        };
        let page = self.store.list_audit(&filter, after.as_deref(), limit).await.map_err(status::store)?;
        let last = page.items.last().filter(|_| page.more);
        Ok(Response::new(proto::ListAuditEntriesResponse {
            next_cursor: last.map(|entry| self.tokens.seal(&purpose, &entry.id)),
            total: page.total,
            entries: page.items.into_iter().map(convert::audit_entry).collect(),
        }))
    }
}
