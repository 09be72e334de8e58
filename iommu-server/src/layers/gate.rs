//! The gate before the services: judges each call by the [table](super::permissions).
//!
//! It knows a caller by its connection alone (I8), before a byte of the message is decoded, and hands the services a
//! [`Caller`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_types::Role;
use iommu_types::errors::{RoleRefused, SessionRequired, ShuttingDown, UnknownMethod};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::permissions::{Needs, Roles, needs};
use crate::connection::ConnectionHandle;
use crate::host::Host;
use crate::host::rates::OwnerBounds;
use crate::services::{Caller, internal};

/// A call that may go on.
#[derive(Debug, Default)]
struct Admitted {
    /// Who calls, for methods that need somebody.
    caller: Option<Caller>,
    /// Its owner's place among the calls under way.
    place: Option<CallPlace>,
}

/// A call that may not.
#[derive(Debug)]
struct Refused {
    status: Status,
    /// How long it waits for its answer: who is over a rate does not come back at once.
    after: Duration,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self { status, after: Duration::ZERO }
    }
}

/// Given back on drop.
#[derive(Debug)]
struct CallPlace(Arc<OwnerBounds>);

impl Drop for CallPlace {
    fn drop(&mut self) {
        self.0.calls.leave();
    }
}

/// Judges a call.
fn judge(host: &Host, path: &str, connection: Option<&ConnectionHandle>) -> Result<Admitted, Refused> {
    let needs = needs(path).ok_or_else(|| UnknownMethod {}.into_status())?;
    if needs == Needs::Nothing {
        return Ok(Admitted::default());
    }
    if host.shutdown.ended().is_some() {
        return Err(ShuttingDown {}.into_status().into());
    }
    if let Some(ending) = connection.and_then(ConnectionHandle::ended) {
        return Err(ending.clone().into_status().into());
    }
    let connection = connection.ok_or_else(|| internal("a request came over no connection"))?;
    let Needs::Session(roles) = needs else { return Ok(Admitted::default()) };
    let caller = caller(connection, roles)?;
    let place = caller.session.bounds().map(place).transpose()?;
    Ok(Admitted { caller: Some(caller), place })
}

fn caller(connection: &ConnectionHandle, roles: Roles) -> Result<Caller, Status> {
    let refused = |role: Role| RoleRefused { role: role.to_string(), needs: roles.words() };
    let Some(session) = connection.session() else {
        return Err(match connection.identity() {
            Some(identity) if matches!(identity.role, Role::Device(_)) => {
                refused(identity.role).into_status()
            }
            _ => SessionRequired {}.into_status(),
        });
    };
    if let Some(ending) = session.end.ended() {
        return Err(ending.clone().into_status());
    }
    if !roles.admit(session.identity.role) {
        return Err(refused(session.identity.role).into_status());
    }
    Ok(Caller { session: Arc::clone(session), connection: connection.clone() })
}

/// A place among the calls of an owner or a hypervisor, if it is within its rate (I7).
fn place(bounds: &Arc<OwnerBounds>) -> Result<CallPlace, Refused> {
    bounds.calls.enter().map_err(WireError::into_status)?;
    let place = CallPlace(Arc::clone(bounds));
    match bounds.requests.take(1) {
        Ok(()) => Ok(place),
        Err(over) => Err(Refused { after: over.penalty(), status: over.limit.into_status() }),
    }
}

/// Puts the gate before the services.
#[derive(Clone, Debug)]
pub struct GateLayer {
    /// The host.
    pub host: Arc<Host>,
}

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;
    fn layer(&self, inner: S) -> Gate<S> {
        Gate { host: Arc::clone(&self.host), inner }
    }
}

/// The services behind the gate.
#[derive(Clone, Debug)]
pub struct Gate<S> {
    host: Arc<Host>,
    inner: S,
}

impl<S> Service<http::Request<Body>> for Gate<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let connection = request.extensions().get::<ConnectionHandle>();
        match judge(&self.host, request.uri().path(), connection) {
            Ok(Admitted { caller, place }) => {
                if let Some(caller) = caller {
                    request.extensions_mut().insert(caller);
                }
                let call = self.inner.call(request);
                Box::pin(async move {
                    let _place = place;
                    call.await
                })
            }
            Err(Refused { status, after }) => Box::pin(async move {
                if !after.is_zero() {
                    tokio::time::sleep(after).await;
                }
                Ok(status.into_http())
            }),
        }
    }
}
