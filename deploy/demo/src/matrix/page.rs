//! The parts of the page that never change: how it looks, by day and by night, from the back of a lecture hall.

/// Styles. Colours say the same as symbols and words, so that nobody needs to see colours.
pub(super) const STYLE: &str = r#"
:root { color-scheme: light dark; --ink:#16181d; --paper:#fff; --line:#c9ccd3; --quiet:#5b6270; --good:#d7f2dc; --good-ink:#0b5a24; --soft:#d9ecfa;
  --soft-ink:#0b4a75; --page:#fff0c2; --page-ink:#6b4c00; --window:#ffe0c2; --window-ink:#7a3c00; --bad:#f9d3d3; --bad-ink:#8c1212; --nil:#eceef1; }
@media (prefers-color-scheme: dark) { :root { --ink:#eceef2; --paper:#14161a; --line:#3b404a; --quiet:#a4abb8; --good:#12381f; --good-ink:#9ae6b0;
  --soft:#12304a; --soft-ink:#9fd2f7; --page:#3d3208; --page-ink:#ffdf80; --window:#43260d; --window-ink:#ffbf85; --bad:#4a1616; --bad-ink:#ffaaaa; --nil:#22252b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 110rem; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 1.15rem/1.45 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; }
h1 { font-size: 2.4rem; line-height: 1.15; margin: 0 0 .4rem; } h2 { font-size: 1.7rem; margin: 2.6rem 0 .7rem; }
p { max-width: 60rem; } .quiet { color: var(--quiet); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; } th, td { border: 1px solid var(--line); padding: .5rem .6rem;
  text-align: left; vertical-align: top; } thead th { position: sticky; top: 0; background: var(--paper); } thead small { display: block; font-weight: 400;
  color: var(--quiet); }
.lecture { font-size: 1.45rem; } .lecture td:nth-child(n+3), .lecture th:nth-child(n+3) { width: 16rem; }
td.cell { white-space: nowrap; } td.cell b { display: block; } td.cell small { display: block; white-space: normal; }
.refused { background: var(--good); color: var(--good-ink); } .deflected { background: var(--soft); color: var(--soft-ink); }
.page { background: var(--page); color: var(--page-ink); } .window { background: var(--window); color: var(--window-ink); }
.succeeds { background: var(--bad); color: var(--bad-ink); } .none { background: var(--nil); color: var(--quiet); }
.differs { outline: .3rem solid var(--bad-ink); outline-offset: -.3rem; }
.legend { display: flex; flex-wrap: wrap; gap: .6rem; padding: 0; list-style: none; } .legend li { padding: .35rem .8rem; border-radius: .4rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; font-weight: 600; } dl { display: grid;
  grid-template-columns: 10rem 1fr; gap: .5rem 1rem; } dt { font-weight: 600; } dd { margin: 0; }
a.in { color: inherit; text-decoration: none; } @media print { thead th { position: static; } }
"#;

/// Text as it may stand in a page, in attributes too.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_text_is_taken_for_markup() {
        assert_eq!(escaped(r#"<a b="c">&'"#), "&lt;a b=&quot;c&quot;&gt;&amp;&#39;");
    }
}
