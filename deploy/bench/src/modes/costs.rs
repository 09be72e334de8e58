//! What one event costs: read from a file, so that a reader can put other numbers in.
//!
//! **Promise:** a file has every key of [`KEYS`] with its unit and says where each figure comes from, or it is refused with the name
//! of the key. Nothing is filled in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// The costs of the rIOMMU paper's model.
const RIOMMU: &str = include_str!("../../costs/riommu-asplos15.toml");

const PER_CALL: &str = "cycles/call";
const PER_INVALIDATION: &str = "cycles/invalidation";
const PER_ENTRY: &str = "cycles/entry";

/// Every key and its unit.
const KEYS: &[(&str, &str)] = &[
    ("machine.cycles_per_second", "cycles/s"),
    ("machine.bytes_per_packet", "bytes/packet"),
    ("machine.base", "cycles/packet"),
    ("machine.iotlb_miss", "cycles/miss"),
    ("strict.map.iova_alloc", PER_CALL),
    ("strict.map.page_table", PER_CALL),
    ("strict.map.other", PER_CALL),
    ("strict.unmap.iova_find", PER_CALL),
    ("strict.unmap.iova_free", PER_CALL),
    ("strict.unmap.page_table", PER_CALL),
    ("strict.unmap.other", PER_CALL),
    ("strict.invalidation.one", PER_INVALIDATION),
    ("strict+.map.iova_alloc", PER_CALL),
    ("strict+.map.page_table", PER_CALL),
    ("strict+.map.other", PER_CALL),
    ("strict+.unmap.iova_find", PER_CALL),
    ("strict+.unmap.iova_free", PER_CALL),
    ("strict+.unmap.page_table", PER_CALL),
    ("strict+.unmap.other", PER_CALL),
    ("strict+.invalidation.one", PER_INVALIDATION),
    ("deferred.map.iova_alloc", PER_CALL),
    ("deferred.map.page_table", PER_CALL),
    ("deferred.map.other", PER_CALL),
    ("deferred.unmap.iova_find", PER_CALL),
    ("deferred.unmap.iova_free", PER_CALL),
    ("deferred.unmap.page_table", PER_CALL),
    ("deferred.unmap.other", PER_CALL),
    ("deferred.invalidation.one", PER_INVALIDATION),
    ("deferred+.map.iova_alloc", PER_CALL),
    ("deferred+.map.page_table", PER_CALL),
    ("deferred+.map.other", PER_CALL),
    ("deferred+.unmap.iova_find", PER_CALL),
    ("deferred+.unmap.iova_free", PER_CALL),
    ("deferred+.unmap.page_table", PER_CALL),
    ("deferred+.unmap.other", PER_CALL),
    ("deferred+.invalidation.one", PER_INVALIDATION),
    ("ring.map.other", PER_CALL),
    ("ring.unmap.other", PER_CALL),
    ("ring.entry.update", PER_ENTRY),
    ("ring.entry.sync_noncoherent", PER_ENTRY),
    ("ring.invalidation.one", PER_INVALIDATION),
    ("identity.map.page_lookup", PER_CALL),
    ("identity.map.other", PER_CALL),
    ("identity.unmap.page_lookup", PER_CALL),
    ("identity.unmap.other", PER_CALL),
    ("identity.entry.update", PER_ENTRY),
    ("identity.invalidation.one", PER_INVALIDATION),
    ("bounce.map.shadow_take", PER_CALL),
    ("bounce.map.other", PER_CALL),
    ("bounce.unmap.shadow_find", PER_CALL),
    ("bounce.unmap.shadow_put", PER_CALL),
    ("bounce.unmap.other", PER_CALL),
    ("bounce.copy.bytes_per_cycle", "bytes/cycle"),
    ("bounce.entry.update", PER_ENTRY),
    ("bounce.invalidation.one", PER_INVALIDATION),
    ("walk.first", "ns/page"),
    ("walk.each", "ns/read"),
];

/// These divide, so they must not be zero.
const DIVISORS: &[&str] =
    &["machine.cycles_per_second", "machine.bytes_per_packet", "bounce.copy.bytes_per_cycle"];

/// Where figures come from: read in a paper, recalled and not checked, derived.
const PROVENANCES: &[&str] = &["V", "M", "D"];

/// Unit costs, complete.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Costs {
    values: BTreeMap<&'static str, f64>,
}

/// Why a file of costs is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CostsError {
    /// It cannot be read.
    #[error("cannot read the costs in {}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML.
    #[error("the costs are not TOML")]
    Syntax(#[from] toml::de::Error),
    /// A key is missing.
    #[error("the costs have no {key}, in {unit}")]
    Missing {
        /// Which.
        key: &'static str,
        /// Its unit.
        unit: &'static str,
    },
    /// A key says something that makes no sense.
    #[error("the costs say nonsense: {key} {why}")]
    Nonsense {
        /// Which.
        key: String,
        /// What is wrong.
        why: String,
    },
}

impl Costs {
    /// The costs of the rIOMMU paper's model.
    pub(crate) fn of_riommu_paper() -> Self {
        Self::parse(RIOMMU).expect("the file is checked in and tested")
    }
    /// The costs in a file.
    pub(crate) fn read(path: &Path) -> Result<Self, CostsError> {
        let unreadable = |source| CostsError::Unreadable { path: path.to_owned(), source };
        Self::parse(&std::fs::read_to_string(path).map_err(unreadable)?)
    }
    /// A cost by its key.
    pub(crate) fn of(&self, key: &str) -> f64 {
        *self.values.get(key).unwrap_or_else(|| panic!("{key} is not among the keys of costs"))
    }
    /// Gigabits per second of packets that take so many cycles.
    pub(crate) fn gigabits_per_second(&self, cycles: f64) -> f64 {
        self.of("machine.bytes_per_packet") * 8.0 * self.of("machine.cycles_per_second") / cycles / 1e9
    }

    fn parse(text: &str) -> Result<Self, CostsError> {
        let table: Table = text.parse()?;
        let mut values = BTreeMap::new();
        for &(key, unit) in KEYS {
            let mut at = Some(&table);
            let (path, last) = key.rsplit_once('.').expect("keys have two parts or more");
            for part in path.split('.') {
                at = at.and_then(|table| table.get(part)).and_then(Value::as_table);
            }
            let found = at.and_then(|table| table.get(last)).ok_or(CostsError::Missing { key, unit })?;
            let value = figure(found, unit, DIVISORS.contains(&key));
            values.insert(key, value.map_err(|why| CostsError::Nonsense { key: key.to_owned(), why })?);
        }
        refuse_unknown(&table, "")?;
        Ok(Self { values })
    }
}

/// `{ value, unit, from }`, and nothing else.
fn figure(found: &Value, unit: &str, is_divisor: bool) -> Result<f64, String> {
    let table = found.as_table().ok_or("must be { value, unit, from }")?;
    let number = match table.get("value") {
        Some(Value::Integer(number)) => *number as f64,
        Some(Value::Float(number)) => *number,
        _ => return Err("has no number as its value".to_owned()),
    };
    if !number.is_finite() || number < 0.0 || (is_divisor && number == 0.0) {
        let least = if is_divisor { "above 0" } else { "0 or more" };
        return Err(format!("is {number}, and must be {least}"));
    }
    let word = |key: &str| table.get(key).and_then(Value::as_str).unwrap_or_default();
    if word("unit") != unit {
        return Err(format!("has the unit {:?}, and is counted in {unit:?}", word("unit")));
    }
    if !PROVENANCES.contains(&word("from")) {
        return Err(format!("comes from {:?}, and must come from \"V\", \"M\" or \"D\"", word("from")));
    }
    Ok(number)
}

/// A key that nobody reads is a misspelt one.
fn refuse_unknown(table: &Table, above: &str) -> Result<(), CostsError> {
    for (name, value) in table {
        let key = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
        if KEYS.iter().any(|(known, _)| *known == key) {
            continue;
        }
        let is_above = KEYS.iter().any(|(known, _)| known.starts_with(&format!("{key}.")));
        match value.as_table().filter(|_| is_above) {
            Some(inner) => refuse_unknown(inner, &key)?,
            None => return Err(CostsError::Nonsense { key, why: "is not a cost of the model".to_owned() }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Costs, RIOMMU};

    /// The paper's file with one text replaced, and the beginning of the error.
    fn check(from: &str, to: &str, error: &str) {
        assert!(RIOMMU.contains(from), "{from}");
        let told = Costs::parse(&RIOMMU.replacen(from, to, 1)).expect_err("refused").to_string();
        assert!(told.starts_with(error), "{told}");
    }

    #[test]
    fn a_file_that_makes_no_sense_is_refused_by_the_name_of_the_key() {
        check(
            "base = { value = 1816,",
            "bass = { value = 1816,",
            "the costs have no machine.base, in cycles/packet",
        );
        check("[walk]", "[walks]", "the costs have no walk.first");
        check("value = 1816", "value = -1", "the costs say nonsense: machine.base is -1");
        check("value = 1816", "value = nan", "the costs say nonsense: machine.base is NaN");
        check("value = 1816", "value = \"many\"", "the costs say nonsense: machine.base has no number");
        check(
            "value = 3.1e9",
            "value = 0",
            "the costs say nonsense: machine.cycles_per_second is 0, and must be above",
        );
        check(
            "unit = \"cycles/miss\"",
            "unit = \"ns\"",
            "the costs say nonsense: machine.iotlb_miss has the unit",
        );
        check(
            "value = 1532, unit = \"cycles/miss\", from = \"M\"",
            "value = 1532, unit = \"cycles/miss\", from = \"X\"",
            "the costs say nonsense: machine.iotlb_miss comes from",
        );
        check("[walk]", "[extra]\nx = 1\n[walk]", "the costs say nonsense: extra is not a cost");
        check("[walk]", "[walk]\nlast = 5", "the costs say nonsense: walk.last is not a cost");
        check("[walk]", "[walk", "the costs are not TOML");
    }

    /// A column of Table 1 sums to what the paper's table says.
    fn check_column(column: &str, map: f64, unmap: f64) {
        let costs = Costs::of_riommu_paper();
        let sum =
            |parts: &[&str]| parts.iter().map(|part| costs.of(&format!("{column}.{part}"))).sum::<f64>();
        assert_eq!(sum(&["map.iova_alloc", "map.page_table", "map.other"]), map, "{column}");
        let parts = ["unmap.iova_find", "unmap.iova_free", "unmap.page_table", "unmap.other"];
        assert_eq!(sum(&parts), unmap, "{column}");
    }

    #[test]
    fn the_columns_add_up() {
        check_column("strict", 4618.0, 2999.0 - 2127.0);
        check_column("strict+", 727.0, 3067.0 - 2135.0);
        check_column("deferred", 2251.0, 1137.0 - 9.0);
        check_column("deferred+", 727.0, 1240.0 - 9.0);
    }
}
