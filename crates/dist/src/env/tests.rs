//! Recorded environments as a table, and what a table cannot say.

use super::check;
use std::collections::BTreeSet;

const LAUNCHERS: &str = include_str!("../../../../tests/fixtures/launch/launchers.json");
const RULES: &str = include_str!("../../../../tests/fixtures/launch/rules.json");

fn failures(text: &str) -> Vec<String> {
    let cases = check::parse(text).expect("a file of cases");
    assert!(cases.len() > 40, "{} cases", cases.len());
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    let failures = cases.iter().filter_map(|case| {
        let problem = case.check().err()?;
        Some(format!("{}: {problem}", case.name))
    });
    failures.collect()
}

#[test]
fn every_recorded_launcher_is_understood() {
    assert_eq!(failures(LAUNCHERS), Vec::<String>::new());
}

#[test]
fn every_rule_and_cross_check_has_a_case_that_holds() {
    assert_eq!(failures(RULES), Vec::<String>::new());
}
