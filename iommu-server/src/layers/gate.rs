//! The gate before the services: judges each call by the [table](super::permissions).
//!
//! It knows a caller by its connection alone (I8), before a byte of the message is decoded, and hands the services a
//! [`Caller`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use iommu_proto::errors::WireError;
use iommu_types::Role;
use iommu_types::errors::{RoleRefused, SessionRequired, ShuttingDown, UnknownMethod};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::permissions::{Needs, needs};
use crate::connection::ConnectionHandle;
use crate::host::Host;
use crate::services::{Caller, internal};

/// Judges a call; the caller comes back for methods that need one.
fn judge(host: &Host, path: &str, connection: Option<&ConnectionHandle>) -> Result<Option<Caller>, Status> {
    let needs = needs(path).ok_or_else(|| UnknownMethod {}.into_status())?;
    if needs == Needs::Nothing {
        return Ok(None);
    }
    if host.shutdown.ended().is_some() {
        return Err(ShuttingDown {}.into_status());
    }
    let connection = connection.ok_or_else(|| internal("a request came over no connection"))?;
    let Needs::Session(roles) = needs else { return Ok(None) };
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
    Ok(Some(Caller { session: Arc::clone(session), connection: connection.clone() }))
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
            Ok(caller) => {
                if let Some(caller) = caller {
                    request.extensions_mut().insert(caller);
                }
                Box::pin(self.inner.call(request))
            }
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}
