//! Which measurements there are.

use anyhow::bail;

use crate::in_process;
use crate::modes;
use crate::report::Report;
use crate::stand::Bench;
use crate::tenants;
use crate::wire;

/// One measurement: one or more figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Measurement {
    /// Its name; those of its figures begin with it.
    pub(crate) name: &'static str,
    /// What it measures, in a line.
    pub(crate) about: &'static str,
}

const fn measurement(name: &'static str, about: &'static str) -> Measurement {
    Measurement { name, about }
}

/// All of them, in their order.
pub(crate) const ALL: &[Measurement] = &[
    // First, while the heap is untouched.
    measurement("memory-mapping", "memory per live mapping: heap, record, tables"),
    measurement(
        "iotlb-hit",
        "lookup with the permission check, random keys, 100 % hits, beside vm-memory's Iotlb",
    ),
    measurement("translate", "a hit, a hit with a 64-byte copy, and a miss (4-level walk and fill)"),
    measurement("map-unmap-in-process", "a strict map and unmap of 4 KiB through the kernel floor"),
    measurement("growth-domains", "the same from 1 to 1,024 domains"),
    measurement("growth-mappings", "the same, first in first out, from 1 k to 1 M live mappings"),
    measurement("modes-rings", "a replay of a NIC's rings in every mode: counts, modelled cycles, time"),
    measurement("modes-pair", "a map and unmap in every mode, in batches of 200"),
    measurement("modes-growth-domains", "the same from 1 to 1,024 domains, in the modes beside strict"),
    measurement(
        "modes-growth-mappings",
        "the same from 1 k to 1 M live mappings, where the mode allows so many",
    ),
    measurement("modes-visits", "what finding a free address takes, by live addresses and allocator"),
    measurement("modes-ageing", "a day of mixed sizes with the cached allocator"),
    measurement("modes-iotlb", "misses per MiB of an IOTLB of 64 entries, by buffer size and order"),
    measurement("modes-walk-cache", "table entries read per page, by when cached tables are forgotten"),
    measurement("modes-stale", "how long a device can use what was unmapped"),
    measurement("modes-copy", "copy against invalidate by size, and where they meet"),
    measurement("modes-tenants", "4 to 1,024 tenants and one that thrashes the IOTLB, shared or partitioned"),
    measurement(
        "modes-sanitizer",
        "instructions per DMA without a sanitizer in the code, with it off, and on",
    ),
    measurement(
        "tenants-iotlb",
        "hits beside a neighbour who thrashes, with the server's geometry and partitions",
    ),
    measurement("tenants-rates", "what paying for a batch of DMA costs, beside the batch"),
    measurement("start", "from spawning the server to its ready line"),
    measurement("latency-tcp", "one DMA in flight over TCP, beside the echo"),
    measurement("latency-unix", "one DMA in flight over a UNIX socket, beside the echo"),
    measurement("dma-tcp", "batches of reads and writes over TCP, 64 B to 1 MiB, beside the echo"),
    measurement("dma-unix", "batches of reads and writes over a UNIX socket, 64 B to 1 MiB, beside the echo"),
    measurement("agents", "1 to 64 agents at once, the sum of all"),
    measurement("map-unmap-stream", "strict map and unmap over one stream, batches of 64"),
    measurement("modes-wire", "a receive ring over the wire in each mode, beside passthrough"),
    measurement("tenants-tls", "DMA over mutual TLS beside plaintext, in batches and one at a time"),
    measurement(
        "tenants-sharing",
        "packets of guests: a device of their own in four modes, or one shared by copying",
    ),
    measurement("tenants-isolation", "a victim beside a neighbour who keeps to its limits, or floods"),
    measurement("memory-session", "memory of the server per idle device session and per idle driver session"),
];

/// Which figures are wanted: those whose names begin with one of the words; all without words.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted(pub(crate) Vec<String>);

impl Wanted {
    /// Whether a figure is wanted.
    pub(crate) fn figure(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|word| name.starts_with(word.as_str()))
    }

    /// Whether any figure whose name begins so is wanted.
    pub(crate) fn any_of(&self, prefix: &str) -> bool {
        self.figure(prefix) || self.0.iter().any(|word| word.starts_with(prefix))
    }

    /// The measurements that give them. `Err` names a word that stands for nothing.
    pub(crate) fn measurements(&self) -> Result<Vec<Measurement>, &str> {
        if let Some(word) = self.0.iter().find(|word| !ALL.iter().any(|m| m.may_give(word))) {
            return Err(word);
        }
        let wanted = |m: &&Measurement| self.0.is_empty() || self.0.iter().any(|word| m.may_give(word));
        Ok(ALL.iter().filter(wanted).copied().collect())
    }
}

impl Measurement {
    /// Whether a word is the beginning of its name, or of the name of a figure of it.
    fn may_give(&self, word: &str) -> bool {
        self.name.starts_with(word) || word.strip_prefix(self.name).is_some_and(|rest| rest.starts_with('-'))
    }
}

/// Runs one.
pub(crate) async fn run(measurement: Measurement, bench: &mut Bench) -> anyhow::Result<Report> {
    match measurement.name {
        "iotlb-hit" => in_process::iotlb::hits(bench),
        "translate" => in_process::translate::hit_copy_and_miss(bench),
        "map-unmap-in-process" => in_process::mapping::pair(bench),
        "growth-domains" => in_process::growth::domains(bench),
        "growth-mappings" => in_process::growth::mappings(bench),
        "memory-mapping" => in_process::memory::per_mapping(bench),
        "modes-rings" => modes::rings::rings(bench),
        "modes-pair" => modes::pair::pair(bench),
        "modes-growth-domains" => modes::growth::domains(bench),
        "modes-growth-mappings" => modes::growth::mappings(bench),
        "modes-visits" => modes::visits::visits(bench),
        "modes-ageing" => modes::ageing::ageing(bench),
        "modes-iotlb" => modes::reach::misses(bench),
        "modes-walk-cache" => modes::walk_cache::policies(bench),
        "modes-stale" => modes::stale::windows(bench),
        "modes-copy" => modes::copies::copies(bench),
        "modes-tenants" => modes::tenants::tenants(bench),
        "modes-sanitizer" => modes::sanitizer::instructions(bench).await,
        "tenants-iotlb" => tenants::iotlb::thrashed(bench),
        "tenants-rates" => tenants::rates::payment(bench),
        "tenants-tls" => tenants::secured::beside_plaintext(bench).await,
        "tenants-sharing" => tenants::sharing::ways(bench).await,
        "tenants-isolation" => tenants::isolation::beside_a_flood(bench).await,
        "start" => wire::start::ready(bench).await,
        "latency-tcp" => wire::latency::one_in_flight(bench, wire::Transport::Tcp).await,
        "latency-unix" => wire::latency::one_in_flight(bench, wire::Transport::Unix).await,
        "dma-tcp" => wire::throughput::batches(bench, wire::Transport::Tcp).await,
        "dma-unix" => wire::throughput::batches(bench, wire::Transport::Unix).await,
        "agents" => wire::agents::many(bench).await,
        "map-unmap-stream" => wire::map_stream::pairs(bench).await,
        "modes-wire" => wire::modes::rings(bench).await,
        "memory-session" => wire::memory::per_idle_session(bench).await,
        other => bail!("{other} is in the catalogue and has no code"),
    }
}

#[cfg(test)]
mod tests {
    use super::{ALL, Wanted};

    fn check(words: &[&str], expected: Result<&[&str], &str>) {
        let wanted = Wanted(words.iter().map(|word| (*word).to_owned()).collect());
        let names = wanted.measurements().map(|all| all.iter().map(|m| m.name).collect::<Vec<_>>());
        assert_eq!(names.as_deref(), expected.as_deref(), "{words:?}");
    }

    #[test]
    fn a_word_chooses_by_the_beginning_of_names() {
        check(&["latency", "start"], Ok(&["start", "latency-tcp", "latency-unix"]));
        check(&["dma-unix-read-64"], Ok(&["dma-unix"]));
        check(&["start", "nonsense"], Err("nonsense"));
        check(&["dma-tcpx"], Err("dma-tcpx"));
        let all: Vec<_> = ALL.iter().map(|m| m.name).collect();
        check(&[], Ok(&all));
    }

    #[test]
    fn figures_are_chosen_within_a_measurement() {
        let wanted = Wanted(vec!["dma-unix-read".to_owned()]);
        assert!(wanted.figure("dma-unix-read-64") && !wanted.figure("dma-unix-write-64"));
        assert!(wanted.any_of("dma-unix") && wanted.any_of("dma-unix-read-64") && !wanted.any_of("dma-tcp"));
        assert!(Wanted::default().figure("anything"));
    }
}
