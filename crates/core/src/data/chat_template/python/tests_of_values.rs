//! Jinja's tests of values: `x is even`.

use super::objects::{self, BoundMethod, Generator, View};
use super::operators::{contains, order_holds, percent};
use super::repr::python_str;
use super::strings::predicate;
use super::{Result, type_name};
use minijinja::value::ValueKind;
use minijinja::{Environment, State, Value};

/// Tests of the engine that Jinja does not have.
const FOREIGN: [&str; 4] = ["endingwith", "int", "safe", "startingwith"];

pub(super) fn install(environment: &mut Environment<'static>) {
    for name in FOREIGN {
        environment.remove_test(name);
    }
    environment.add_test("callable", is_callable);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && (value.is_undefined() || value.try_iter().is_ok())
    });
    environment.add_test("in", |state: &State, value: &Value, container: &Value| {
        contains(state, container, value)
    });
    for name in ["lower", "upper"] {
        environment.add_test(name, move |value: &Value| -> Result<bool> {
            let answer = predicate(&python_str(value)?, &format!("is{name}"))?;
            Ok(answer == Some(true))
        });
    }
    environment.add_test("odd", |state: &State, value: &Value| {
        Ok(percent(state, value, &Value::from(2))? == Value::from(1))
    });
    environment.add_test("even", |state: &State, value: &Value| {
        Ok(percent(state, value, &Value::from(2))? == Value::from(0))
    });
    environment.add_test(
        "divisibleby",
        |state: &State, value: &Value, number: &Value| {
            Ok(percent(state, value, number)? == Value::from(0))
        },
    );
    for (names, operator) in [
        (["lt", "lessthan"], "<"),
        (["gt", "greaterthan"], ">"),
        (["le", "<="], "<="),
        (["ge", ">="], ">="),
    ] {
        for name in names {
            environment.add_test(name, move |state: &State, left: &Value, right: &Value| {
                order_holds(state, operator, left, right)
            });
        }
    }
}

fn is_callable(value: &Value) -> bool {
    if value.downcast_object_ref::<BoundMethod>().is_some() {
        return true;
    }
    objects::is_macro(value) || matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
}

/// Whether it has a length and items by number or name.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String | ValueKind::Map | ValueKind::Seq | ValueKind::Undefined => true,
        ValueKind::Iterable => {
            let ours = value.downcast_object_ref::<Generator>().is_some()
                || value.downcast_object_ref::<View>().is_some();
            !ours && type_name(value) == "list"
        }
        _ => false,
    }
}
