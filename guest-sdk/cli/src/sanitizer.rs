//! `sanitizer list`, `follow` and `explain`: what the DMA sanitizer reports.

use guest_sdk::{DomainId, Operator, Owner, SanitizerFilter, SanitizerReport};
use serde_json::json;

use crate::args::{ReportFilter, SanitizerCommand};
use crate::json;
use crate::print::Output;
use crate::reports;
use crate::words::count;

fn filter(which: &ReportFilter) -> SanitizerFilter {
    SanitizerFilter { owner: which.owner, domain_id: which.domain.map(DomainId::new), device: which.device }
}

/// One of the commands.
pub(crate) async fn run(operator: &Operator, out: Output, command: &SanitizerCommand) -> anyhow::Result<()> {
    match command {
        SanitizerCommand::List { filter: which, after, limit } => {
            list(operator, out, filter(which), *after, *limit).await
        }
        SanitizerCommand::Follow { filter: which, from, count } => {
            follow(operator, out, filter(which), from, *count).await
        }
        SanitizerCommand::Explain { number, owner } => explain(operator, out, *number, *owner).await,
    }
}

async fn list(
    operator: &Operator,
    out: Output,
    filter: SanitizerFilter,
    after: Option<u64>,
    limit: u32,
) -> anyhow::Result<()> {
    let sanitizer = operator.sanitizer();
    let list = match after {
        Some(sequence) => sanitizer.list_after(filter, sequence, limit).await?,
        None => sanitizer.list(filter, limit).await?,
    };
    let value = json!({
        "reports": list.reports.iter().map(json::report).collect::<Vec<_>>(),
        "overwritten_count": list.overwritten_count,
        "resume_token": list.resume_token,
    });
    out.page(&value, || {
        let mut page: String =
            list.reports.iter().map(|report| format!("{}\n", reports::line(report))).collect();
        if list.reports.is_empty() {
            page.push_str("no reports; `iommuctl domains` shows which domains the sanitizer looks at\n");
        }
        if list.overwritten_count > 0 {
            let were = count(list.overwritten_count, "older report");
            page.push_str(&format!("{were} overwritten\n"));
        }
        page
    });
    Ok(())
}

async fn follow(
    operator: &Operator,
    out: Output,
    filter: SanitizerFilter,
    from: &str,
    count: Option<u64>,
) -> anyhow::Result<()> {
    let mut new = operator.sanitizer().watch(filter, from).await?;
    let mut token = from.to_owned();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let event = tokio::select! {
            event = new.next() => event,
            interrupted = tokio::signal::ctrl_c() => { interrupted?; return Ok(()); }
        };
        let Some(event) = event else { return Ok(()) };
        let event = event?;
        if event.missed_count > 0 {
            let value = json!({ "missed_count": event.missed_count });
            out.line(&value, || {
                format!("{} reports were overwritten before they could be shown", event.missed_count)
            });
        }
        let count = event.reports.len();
        for (index, report) in event.reports.iter().enumerate() {
            if left == 0 {
                break;
            }
            // The token is that of the whole message: before its last report only the one before misses nothing.
            if index + 1 == count {
                token.clone_from(&event.resume_token);
            }
            let mut value = json::report(report);
            value["resume_token"] = json!((!token.is_empty()).then_some(&token));
            out.line(&value, || reports::line(report));
            left -= 1;
        }
    }
    Ok(())
}

/// Reports are numbered per owner, so all owners are asked where none is named.
async fn explain(operator: &Operator, out: Output, number: u64, owner: Option<Owner>) -> anyhow::Result<()> {
    let owners = match owner {
        Some(owner) => vec![owner],
        None => operator.inspect().topology().await?.owners.into_iter().map(|state| state.owner).collect(),
    };
    let mut found = Vec::new();
    for owner in owners {
        let filter = SanitizerFilter { owner: Some(owner), ..SanitizerFilter::default() };
        let next = operator.sanitizer().list_after(filter, number.saturating_sub(1), 1).await?;
        found.extend(next.reports.into_iter().filter(|report| report.sequence == number));
    }
    let report = only(number, owner, &found)?;
    let sentences = reports::sentences(report);
    let mut value = json::report(report);
    value["sentences"] = json!(sentences);
    out.page(&value, || sentences.iter().map(|sentence| format!("{sentence}\n")).collect());
    Ok(())
}

/// The report that was asked for; the error says what to ask instead.
fn only(number: u64, owner: Option<Owner>, found: &[SanitizerReport]) -> anyhow::Result<&SanitizerReport> {
    match found {
        [report] => Ok(report),
        [] => {
            let whose = owner.map_or_else(String::new, |owner| format!(" of {owner}"));
            anyhow::bail!("no report {number}{whose} is kept; `iommuctl sanitizer list` shows those that are")
        }
        several => {
            let owners: Vec<String> = several.iter().map(|report| report.owner.to_string()).collect();
            anyhow::bail!("{} each have a report {number}; say whose with --owner", owners.join(" and "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reports::tests::report;
    use iommu_types::ReportClass;

    #[test]
    fn the_report_is_the_only_one_of_its_number_or_the_error_says_what_to_ask() {
        let of = |owner| SanitizerReport { owner, ..report(ReportClass::Leak) };
        let (mine, yours) = (of(Owner::Driver(1)), of(Owner::Vm(2)));
        assert_eq!(only(7, None, &[mine]).expect("found"), &mine);
        for (owner, found, expected) in [
            (None, vec![], "no report 7 is kept; `iommuctl sanitizer list` shows those that are"),
            (
                Some(Owner::Vm(2)),
                vec![],
                "no report 7 of vm:2 is kept; `iommuctl sanitizer list` shows those that are",
            ),
            (None, vec![mine, yours], "driver:1 and vm:2 each have a report 7; say whose with --owner"),
        ] {
            let error = only(7, owner, &found).expect_err("not one").to_string();
            assert_eq!(error, expected);
        }
    }
}
