//! What comes of an attack, and how it differs from what must come.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::column::WINDOW;

/// A window that is open for longer than this was not closed by what should close it: a machine under load is late, but not by so much.
const WINDOW_MAX: Duration = WINDOW.saturating_mul(2);

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Nothing of the victim's was reached, and the attacker was told so.
    Refused,
    /// Nothing of the victim's was reached; the attacker reached something harmless and was told nothing.
    Deflected,
    /// What was reached lies on a page that is mapped; the next one was refused.
    Page,
    /// It was reached until a window closed.
    Window,
    /// It was reached, and went on being reached.
    Succeeds,
    /// The cell has no meaning.
    None,
}

impl Outcome {
    /// Every one, from the best to the worst, as legends tell them.
    pub(crate) const ALL: [Self; 6] =
        [Self::Refused, Self::Deflected, Self::Page, Self::Window, Self::Succeeds, Self::None];

    /// In a word or two.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Deflected => "hits a shadow",
            Self::Page => "within the page",
            Self::Window => "in the window",
            Self::Succeeds => "succeeds",
            Self::None => "–",
        }
    }

    /// In one character.
    pub(crate) const fn symbol(self) -> &'static str {
        match self {
            Self::Refused => "✓",
            Self::Deflected => "◇",
            Self::Page => "▤",
            Self::Window => "◷",
            Self::Succeeds => "✗",
            Self::None => "–",
        }
    }

    /// What it says about the victim.
    pub(crate) const fn meaning(self) -> &'static str {
        match self {
            Self::Refused => "refused, and the attacker is told why",
            Self::Deflected => "the device reaches only a shadow buffer; the victim is untouched",
            Self::Page => "reaches the rest of a mapped page, no other page",
            Self::Window => "reaches the victim until a window closes",
            Self::Succeeds => "reaches the victim",
            Self::None => "the cell has no meaning",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.words())
    }
}

/// What came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// What became of the victim.
    pub(crate) outcome: Outcome,
    /// Everything that the attacker was told.
    pub(crate) reasons: BTreeSet<String>,
    /// VT-d reasons that the fault log holds of the attack; `None` where nobody logs.
    pub(crate) logged: Option<BTreeSet<String>>,
    /// How long the window was open.
    pub(crate) window_us: Option<u64>,
    /// What else was measured.
    pub(crate) notes: Vec<String>,
}

/// What must come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expected {
    /// What becomes of the victim.
    pub(crate) outcome: Outcome,
    /// What the attacker is told.
    #[serde(default)]
    pub(crate) reasons: BTreeSet<String>,
    /// The invariant or mechanism that is responsible.
    pub(crate) held_by: String,
    /// Why, in a sentence.
    pub(crate) because: String,
}

/// Whether a reason is one of VT-d's, which stand in the fault log.
pub(super) fn is_fault(reason: &str) -> bool {
    reason.strip_prefix("0x").is_some_and(|digits| digits.len() <= 2)
}

impl Seen {
    /// Everything in which it differs; nothing when nothing does.
    pub(crate) fn differs(&self, expected: &Expected) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.outcome != expected.outcome {
            wrong.push(format!("{} instead of {}", self.outcome, expected.outcome));
        }
        let list = |reasons: &BTreeSet<String>| {
            let all: Vec<&str> = reasons.iter().map(String::as_str).collect();
            if all.is_empty() { "nothing".to_owned() } else { all.join(", ") }
        };
        if self.outcome == Outcome::Window {
            match self.window_us {
                Some(us) if Duration::from_micros(us) <= WINDOW_MAX => {}
                Some(us) => wrong.push(format!(
                    "open for {}, of {} at most",
                    milliseconds(us),
                    milliseconds(WINDOW_MAX.as_micros() as u64)
                )),
                None => wrong.push("nobody knows for how long it was open".to_owned()),
            }
        }
        // Where an attack succeeds, what it was refused beside that is of no account.
        let alike = match expected.outcome {
            Outcome::Succeeds => expected.reasons.is_subset(&self.reasons),
            _ => expected.reasons == self.reasons,
        };
        if !alike {
            wrong.push(format!("told {} instead of {}", list(&self.reasons), list(&expected.reasons)));
        }
        if let Some(logged) = &self.logged {
            let due: BTreeSet<&String> = expected.reasons.iter().filter(|reason| is_fault(reason)).collect();
            for reason in due {
                if !logged.contains(reason) {
                    wrong.push(format!("{reason} is not in the fault log, which holds {}", list(logged)));
                }
            }
        }
        wrong
    }

    /// What came, in one line.
    pub(crate) fn in_short(&self) -> String {
        let mut words = self.outcome.words().to_owned();
        if let Some(us) = self.window_us {
            words += &format!(" ({})", milliseconds(us));
        }
        if !self.reasons.is_empty() {
            let all: Vec<&str> = self.reasons.iter().map(String::as_str).collect();
            words += &format!(": {}", all.join(", "));
        }
        words
    }
}

/// Microseconds as a person reads them.
pub(crate) fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reasons(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|reason| (*reason).to_owned()).collect()
    }

    #[test]
    fn whatever_is_otherwise_is_seen() {
        let expected = Expected {
            outcome: Outcome::Refused,
            reasons: reasons(&["0x5", "0x1001"]),
            held_by: "I1".into(),
            because: "it is so".into(),
        };
        let seen = Seen {
            outcome: Outcome::Refused,
            reasons: reasons(&["0x5", "0x1001"]),
            logged: Some(reasons(&["0x5", "0x6"])),
            window_us: None,
            notes: Vec::new(),
        };
        assert_eq!(seen.differs(&expected), Vec::<String>::new());
        assert_eq!(Seen { logged: None, ..seen.clone() }.differs(&expected).len(), 0, "where nobody logs");
        for otherwise in [
            Seen { outcome: Outcome::Deflected, ..seen.clone() },
            Seen { reasons: reasons(&["0x5"]), ..seen.clone() },
            Seen { reasons: reasons(&["0x5", "0x1001", "0x6"]), ..seen.clone() },
            Seen { logged: Some(reasons(&[])), ..seen.clone() },
        ] {
            assert_eq!(otherwise.differs(&expected).len(), 1, "{otherwise:?}");
        }
    }

    #[test]
    fn a_window_that_closes_late_is_seen() {
        let expected = Expected {
            outcome: Outcome::Window,
            reasons: reasons(&["0x5"]),
            held_by: "the flush queue".into(),
            because: "it is so".into(),
        };
        let open_for = |window: Option<Duration>| Seen {
            outcome: Outcome::Window,
            reasons: reasons(&["0x5"]),
            logged: None,
            window_us: window.map(|window| window.as_micros() as u64),
            notes: Vec::new(),
        };
        for (window, differences) in [(Some(WINDOW), 0), (Some(WINDOW * 3), 1), (None, 1)] {
            assert_eq!(open_for(window).differs(&expected).len(), differences, "{window:?}");
        }
    }

    #[test]
    fn what_an_attack_that_succeeds_was_told_besides_is_of_no_account() {
        let expected = Expected {
            outcome: Outcome::Succeeds,
            reasons: reasons(&["NOT_MAPPED"]),
            held_by: "nothing".into(),
            because: "it is so".into(),
        };
        let seen = |all: &[&str]| Seen {
            outcome: Outcome::Succeeds,
            reasons: reasons(all),
            logged: None,
            window_us: None,
            notes: Vec::new(),
        };
        assert!(seen(&["NOT_MAPPED", "0x5"]).differs(&expected).is_empty());
        assert_eq!(seen(&["0x5"]).differs(&expected).len(), 1);
    }
}
