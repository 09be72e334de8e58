//! Who may call what: the one place where roles are checked.
//!
//! The gate knows a caller by its connection alone (I8), before a byte of the message is decoded, and hands the services a
//! [`Caller`]. A method that is not in the table belongs to nobody and goes to the router, which says so.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use iommu_proto::errors::WireError;
use iommu_types::Role;
use iommu_types::errors::{RoleRefused, SessionRequired, ShuttingDown};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::connection::ConnectionHandle;
use crate::host::Host;
use crate::services::{Caller, internal};

/// A set of roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Roles {
    driver: bool,
    bare: bool,
    observer: bool,
    operator: bool,
    /// In words, for those who are refused.
    words: &'static str,
}

const NONE: Roles = Roles { driver: false, bare: false, observer: false, operator: false, words: "" };
const DRIVER: Roles = Roles { driver: true, words: "the driver role", ..NONE };
const BARE: Roles = Roles { bare: true, words: "the bare role", ..NONE };
const OPERATOR: Roles = Roles { operator: true, words: "the operator role", ..NONE };
const MEMORY: Roles = Roles { driver: true, operator: true, words: "the driver or operator role", ..NONE };
const LOOK: Roles = Roles {
    driver: true,
    observer: true,
    operator: true,
    words: "the driver, observer or operator role",
    ..NONE
};
/// The unit's counters are those of all tenants together, so a driver does not see them (I7).
const COUNT: Roles = Roles {
    bare: true,
    observer: true,
    operator: true,
    words: "the bare, observer or operator role",
    ..NONE
};
const LOOK_AT_UNIT: Roles =
    Roles { bare: true, words: "the driver, bare, observer or operator role", ..LOOK };

/// What a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// Nothing: it opens a session itself, or is for everybody.
    Nothing,
    /// A session with one of these roles.
    Roles(Roles),
}

/// Services, and methods that differ from their service. The longest match counts.
const TABLE: &[(&str, Needs)] = &[
    ("/iommu.v1.SessionService/", Needs::Nothing),
    ("/iommu.v1.DeviceService/", Needs::Nothing),
    ("/iommu.v1.DriverService/", Needs::Roles(DRIVER)),
    ("/iommu.v1.BareMachineService/", Needs::Roles(BARE)),
    ("/iommu.v1.MemoryService/", Needs::Roles(MEMORY)),
    ("/iommu.v1.FaultService/", Needs::Roles(LOOK)),
    ("/iommu.v1.SanitizerService/", Needs::Roles(LOOK)),
    ("/iommu.v1.InspectService/", Needs::Roles(LOOK)),
    ("/iommu.v1.InspectService/GetCounters", Needs::Roles(COUNT)),
    ("/iommu.v1.InspectService/Explain", Needs::Roles(LOOK_AT_UNIT)),
    ("/iommu.v1.InspectService/DumpTables", Needs::Roles(LOOK_AT_UNIT)),
    ("/iommu.v1.AdminService/", Needs::Roles(OPERATOR)),
];

fn needs(path: &str) -> Option<Needs> {
    let matching = TABLE.iter().filter(|(prefix, _)| path.starts_with(prefix));
    matching.max_by_key(|(prefix, _)| prefix.len()).map(|(_, needs)| *needs)
}

impl Roles {
    fn admit(self, role: Role) -> bool {
        match role {
            Role::Device(_) => false,
            Role::Driver(_) => self.driver,
            Role::Bare => self.bare,
            Role::Observer => self.observer,
            Role::Operator => self.operator,
        }
    }
}

/// Judges a call; the caller comes back for methods that need one.
fn judge(host: &Host, path: &str, connection: Option<&ConnectionHandle>) -> Result<Option<Caller>, Status> {
    let Some(needs) = needs(path) else { return Ok(None) };
    if host.shutdown.ended().is_some() {
        return Err(ShuttingDown {}.into_status());
    }
    if let Some(ending) = connection.and_then(ConnectionHandle::ended) {
        return Err(ending.clone().into_status());
    }
    let Needs::Roles(roles) = needs else { return Ok(None) };
    let connection = connection.ok_or_else(|| internal("a request came over no connection"))?;
    let refused = |role: Role| RoleRefused { role: role.to_string(), needs: roles.words.to_owned() };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_the_schema_has_a_rule() {
        for service in crate::server::SERVICES {
            assert!(needs(&format!("/{service}/Anything")).is_some(), "{service}");
        }
    }

    #[test]
    fn the_longest_match_counts() {
        assert_eq!(needs("/iommu.v1.InspectService/Explain"), Some(Needs::Roles(LOOK_AT_UNIT)));
        assert_eq!(needs("/iommu.v1.InspectService/ListDomains"), Some(Needs::Roles(LOOK)));
        assert_eq!(needs("/grpc.health.v1.Health/Check"), None);
    }

    #[test]
    fn only_operators_administer_and_observers_touch_nothing() {
        for (path, roles) in TABLE.iter().filter_map(|(path, needs)| match needs {
            Needs::Roles(roles) => Some((path, roles)),
            Needs::Nothing => None,
        }) {
            let looks = ["Inspect", "Fault", "Sanitizer"].iter().any(|service| path.contains(service));
            assert_eq!(roles.admit(Role::Observer), looks, "{path}");
            assert_eq!(path.contains("Admin"), *roles == OPERATOR, "{path}");
        }
    }
}
