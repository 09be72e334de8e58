//! Mutating calls: carried out once per request ID, in a task of their own (a cancelled call must not lose the end of an unmap), and
//! inside the caller's tenancy, so that a reclaim waits for them.

/// Parses the message as `$model`, then runs `$body` with the host, whoever the caller acts for (`$who`: a method of [`Caller`](super::Caller)),
/// and what is asked.
macro_rules! once {
    ($self:ident, $request:ident, $who:ident, $model:ty, |$host:ident, $actor:ident, $ask:ident| $body:expr) => {{
        let caller = $crate::services::Caller::of(&$request)?;
        let tenancy = std::sync::Arc::clone(caller.tenancy()?);
        let mut wire = $request.into_inner();
        let header = wire.header.take();
        let digest = tenancy.replay.digest(stringify!($model), &wire);
        wire.header = header;
        let $ask: $model = $crate::services::parse(wire)?;
        let name = $crate::session::replay::RequestName::new($ask.header, digest);
        let inside = $crate::services::enter(&caller.session);
        let ($host, $actor) = (std::sync::Arc::clone(&$self.host), std::sync::Arc::clone(caller.$who()?));
        let operation = |inside| async move {
            let _inside = inside;
            $body
        };
        tenancy.replay.once(name, inside, operation).await.map(tonic::Response::new)
    }};
}
pub(super) use once;
