//! Opening a client's session, and what happens when its connection is lost.
//!
//! Opening runs in a task of its own: an `Open` that is cancelled half-way through a reclaim would leave half of it behind.

use std::sync::Arc;

use iommu_proto::errors::WireError;
use iommu_proto::limits;
use iommu_proto::model::{Open, ResumeToken, SessionRole};
use iommu_types::errors::{
    BadResumeToken, IdentityRefused, LimitReached, SessionError, SessionExists, ShuttingDown,
};
use iommu_types::{Identity, Owner};
use tonic::Status;

use super::driver::{ClientSession, Seated, Tenancy, Tenant};
use crate::connection::ConnectionHandle;
use crate::ending::{EndSignal, Ending};
use crate::host::Host;
use crate::host::owners::OwnerState;
use crate::machine::BareClient;

/// Bytes of a resume token that a refusal repeats.
const TOKEN_BYTES_SHOWN: usize = 4;

/// A session that stands.
#[derive(Debug)]
pub struct Opened {
    /// It.
    pub session: Arc<ClientSession>,
    /// Brings it back; all zeros for those who hold nothing.
    pub token: ResumeToken,
    /// Whether it continues an earlier one.
    pub resumed: bool,
}

/// Sixteen bytes that nobody can guess.
fn fresh_token() -> Result<ResumeToken, Status> {
    let mut token = [0; limits::RESUME_TOKEN_BYTES];
    let filled = rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty());
    match filled {
        Ok(length) if length == token.len() => Ok(ResumeToken(token)),
        _ => Err(crate::services::internal("the system gave no random bytes")),
    }
}

/// What of a token may be told and logged: enough to tell one from another, and too little to come back with.
fn beginning(token: ResumeToken) -> String {
    let shown: String = token.0.iter().take(TOKEN_BYTES_SHOWN).map(|byte| format!("{byte:02x}")).collect();
    shown + "..."
}

/// Opens a session on a connection.
pub async fn open(host: &Arc<Host>, connection: &ConnectionHandle, open: Open) -> Result<Opened, Status> {
    let refuse = |error: SessionError| Err(error.into_status());
    if host.shutdown.ended().is_some() {
        return refuse(ShuttingDown {}.into());
    }
    if connection.identity().is_some() {
        return refuse(SessionExists {}.into());
    }
    connection.must_be_certified(&identity(&open)).map_err(WireError::into_status)?;
    host.certificate_holds(connection)?;
    let Some(tenant) = tenant(host, &open).map_err(WireError::into_status)? else {
        return open_without_tenancy(host, connection, open).map_err(WireError::into_status);
    };
    let opening = open_tenancy(Arc::clone(host), connection.clone(), tenant, open);
    match tokio::spawn(opening).await {
        Ok(opened) => opened,
        Err(_) => Err(crate::services::internal("opening a session ended early")),
    }
}

/// Who holds things for this identity, as the configuration knows it; `None` for those who hold nothing.
fn tenant(host: &Arc<Host>, open: &Open) -> Result<Option<Tenant>, SessionError> {
    let refused = |why: String| SessionError::from(IdentityRefused { name: open.name.clone(), why });
    let not_listed = |role: &str| refused(format!("the configuration lists no {role} of this name"));
    match open.role {
        SessionRole::Driver(owner) => {
            let state = host.owners.get(owner).map_err(|unknown| refused(unknown.to_string()))?;
            if state.name != open.name {
                return Err(refused(format!("the driver of {owner} has another name")));
            }
            Ok(Some(Tenant::Driver(state)))
        }
        SessionRole::Bare if !host.config.bare.admit(&open.name) => Err(not_listed("bare-machine client")),
        SessionRole::Bare => Ok(Some(Tenant::Bare(bare_client(host, &open.name)?))),
        SessionRole::Hypervisor if !host.config.hypervisors.admit(&open.name) => {
            Err(not_listed("hypervisor"))
        }
        SessionRole::Hypervisor => Ok(Some(Tenant::Hypervisor(host.hypervisors.get_or_make(&open.name)?))),
        SessionRole::Observer if !host.config.observers.admit(&open.name) => Err(not_listed("observer")),
        SessionRole::Operator if !host.config.operators.admit(&open.name) => Err(not_listed("operator")),
        SessionRole::Observer | SessionRole::Operator => Ok(None),
    }
}

fn bare_client(host: &Host, name: &str) -> Result<Arc<BareClient>, LimitReached> {
    host.machines.client(name)
}

fn identity(open: &Open) -> Identity {
    Identity { name: open.name.clone(), role: open.role.into() }
}

fn open_without_tenancy(
    host: &Host,
    connection: &ConnectionHandle,
    open: Open,
) -> Result<Opened, SessionError> {
    let identity = identity(&open);
    if !connection.identify(&identity) {
        return Err(SessionExists {}.into());
    }
    let generation = host.next_anonymous_generation();
    let session = Arc::new(ClientSession { identity, generation, end: EndSignal::new(), tenant: None });
    connection.bind(Arc::clone(&session));
    tracing::info!(identity = %session.identity, peer = %connection.peer(), "session opened");
    Ok(Opened { session, token: ResumeToken([0; limits::RESUME_TOKEN_BYTES]), resumed: false })
}

async fn open_tenancy(
    host: Arc<Host>,
    connection: ConnectionHandle,
    tenant: Tenant,
    open: Open,
) -> Result<Opened, Status> {
    let seat = tenant.seat();
    let mut seated = seat.seated.lock().await;
    if seated.is_gone {
        let why = format!("{tenant} is no more");
        return Err(IdentityRefused { name: open.name, why }.into_status());
    }
    if let Some(token) = open.resume_token
        && !seated.tenancy.as_ref().is_some_and(|tenancy| tenancy.token_is(token))
    {
        return Err(BadResumeToken { token: beginning(token) }.into_status());
    }
    let fresh = fresh_token()?;
    let identity = identity(&open);
    if !connection.identify(&identity) {
        return Err(SessionExists {}.into_status());
    }
    let resumed = open.resume_token.is_some();
    let generation = seated.generation + 1;
    seat.fence(generation);
    if !resumed {
        reclaim(&host, &tenant, &mut seated, "opened afresh").await;
    } else if let Some(tenancy) = &seated.tenancy {
        // What the session before has begun is over before this one is welcomed.
        tenancy.settled().await;
    }
    let tenancy = Arc::clone(seated.tenancy.get_or_insert_with(|| Tenancy::new(fresh)));
    let token = tenancy.token;
    let session = Arc::new(ClientSession {
        identity,
        generation,
        end: EndSignal::new(),
        tenant: Some((tenant.clone(), tenancy)),
    });
    seated.generation = generation;
    seated.session = Some(Arc::clone(&session));
    seat.connect(Arc::clone(&session));
    connection.bind(Arc::clone(&session));
    drop(seated);
    tracing::info!(
        identity = %session.identity, generation, resumed, peer = %connection.peer(), "session opened"
    );
    if host.shutdown.ended().is_some() {
        session.end.end(Ending::ShuttingDown);
    }
    tokio::spawn(outlive(host, connection, tenant, Arc::clone(&session)));
    Ok(Opened { session, token, resumed })
}

/// Waits for the end of the connection, then for the grace period, then reclaims what nobody came back for.
async fn outlive(host: Arc<Host>, connection: ConnectionHandle, tenant: Tenant, session: Arc<ClientSession>) {
    connection.closed().await;
    // The connection is held by nobody else now; letting go of it here frees its place during the grace.
    drop(connection);
    tenant.seat().disconnect(&session);
    if host.shutdown.ended().is_some() {
        return;
    }
    tokio::select! {
        _ = host.shutdown.wait() => return,
        () = tokio::time::sleep(host.config.grace) => {}
    }
    let mut seated = tenant.seat().seated.lock().await;
    let still_its = seated.session.as_ref().is_some_and(|seated| Arc::ptr_eq(seated, &session));
    if still_its {
        reclaim(&host, &tenant, &mut seated, "grace is over").await;
    }
}

/// Ends the session of a tenant and reclaims without grace. `true` when there was a session.
pub async fn quarantine(host: Arc<Host>, tenant: Tenant) -> bool {
    let seat = tenant.seat();
    let mut seated = seat.seated.lock().await;
    seated.generation += 1;
    let ended = seat.fence(seated.generation);
    reclaim(&host, &tenant, &mut seated, "quarantined").await;
    ended
}

/// Ends an owner's session and reclaims what it holds, and lets nobody take its seat again.
pub async fn end_for_good(host: &Arc<Host>, owner: &Arc<OwnerState>, why: &str) {
    let mut seated = owner.seat.seated.lock().await;
    seated.is_gone = true;
    seated.generation += 1;
    owner.seat.fence(seated.generation);
    seated.session = None;
    if let Some(tenancy) = seated.tenancy.take() {
        tenancy.close().await;
    }
    host.reclaim_owner(owner, why).await;
}

async fn reclaim(host: &Arc<Host>, tenant: &Tenant, seated: &mut Seated, why: &str) {
    seated.session = None;
    let Some(tenancy) = seated.tenancy.take() else { return };
    tenancy.close().await;
    match tenant {
        Tenant::Driver(owner) => host.reclaim_owner(owner, why).await,
        Tenant::Bare(client) => host.machines.reclaim_client(host, client, why).await,
        Tenant::Hypervisor(hypervisor) => host.reclaim_hypervisor(hypervisor, why).await,
    }
}

/// The tenant of an owner.
pub fn tenant_of(host: &Host, owner: Owner) -> Result<Tenant, iommu_types::errors::UnknownOwner> {
    host.owners.get(owner).map(Tenant::Driver)
}
