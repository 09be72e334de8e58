//! Every attack of the catalogue in every protection mode, with real processes: what must come stands in a [table](expected) of ours, what
//! came is compared with it, cell by cell.
//!
//! The actors (drivers, guests, a hypervisor, the operating system of a bare machine, hostile devices) are processes that are told what to do
//! [line by line](actor); [scenes](scene) put them together, [rows] are the attacks, the [judge] looks at what no attacker can change.

pub(crate) mod act;
mod actor;
mod catalogue;
mod column;
mod evidence;
mod expected;
mod html;
mod judge;
mod outcome;
mod page;
mod report;
mod rows;
mod run;
mod scene;
mod site;

use std::path::PathBuf;

use anyhow::Context;

use self::column::Column;
use self::run::Progress;
use crate::report::progress;

/// Which part of the matrix, and where it goes.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this row; repeat for more. Without it, all of them and the lecture's tables.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=31))]
    row: Vec<u8>,
    /// Only this column; repeat for more.
    #[arg(long, value_enum)]
    column: Vec<Column>,
    /// Write a page for a browser, which needs nothing from elsewhere.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Runs it. `Ok(true)` when every cell came out as it must.
pub(crate) async fn run(options: Options, json: bool) -> anyhow::Result<bool> {
    let table = expected::Table::load()?;
    progress(json, "building the binaries");
    let stage = scene::Stage::start().await?;
    let told = Progress { json };
    let result = run::all(&stage, &table, &options.row, &options.column, &told).await;
    let result = match result {
        Ok(result) => result,
        Err(error) => return Err(error.context(format!("the server's log:\n{}", stage.log().await))),
    };
    stage.end().await?;
    if let Some(file) = &options.html {
        let page = html::page(&result);
        std::fs::write(file, page).with_context(|| format!("write {}", file.display()))?;
        progress(json, &format!("the page is in {}", file.display()));
    }
    report::close(json, &result)
}
