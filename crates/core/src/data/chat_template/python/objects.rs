//! Values of Python that the engine does not have.

use super::{Result, error};
use minijinja::value::{Enumerator, Object, ObjectRepr};
use minijinja::{State, Value};
use std::sync::{Arc, Mutex, PoisonError};

/// What `map`, `select` and others give: items that can be walked once.
#[derive(Debug)]
pub(super) struct Generator {
    name: &'static str,
    items: Mutex<Option<Vec<Value>>>,
}

impl Generator {
    pub(super) fn value(items: Vec<Value>) -> Value {
        Self::named("generator", items)
    }

    pub(super) fn named(name: &'static str, items: Vec<Value>) -> Value {
        Value::from_object(Self {
            name,
            items: Mutex::new(Some(items)),
        })
    }
}

/// The items that a generator has not given yet.
pub(in super::super) fn held_items(value: &Value) -> Option<Vec<Value>> {
    let generator = value.downcast_object_ref::<Generator>()?;
    let items = generator
        .items
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    Some(items.clone().unwrap_or_default())
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    // It has no items by number and no length.
    fn get_value(self: &Arc<Self>, _: &Value) -> Option<Value> {
        Some(Value::UNDEFINED)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        Enumerator::Iter(Box::new(items.take().unwrap_or_default().into_iter()))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }
}

/// `dict.keys()`, `dict.values()` and `dict.items()`.
#[derive(Debug)]
pub(super) struct View {
    name: &'static str,
    items: Vec<Value>,
}

impl View {
    pub(super) fn value(name: &'static str, items: Vec<Value>) -> Value {
        Value::from_object(Self { name, items })
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn get_value(self: &Arc<Self>, _: &Value) -> Option<Value> {
        Some(Value::UNDEFINED)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Iter(Box::new(self.items.clone().into_iter()))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.items.len())
    }
}

/// `range(start, stop, step)`.
#[derive(Debug)]
pub(super) struct Range {
    start: i64,
    stop: i64,
    step: i64,
    length: usize,
}

/// The longest range that the sandbox allows.
const MAX_RANGE: i128 = 100_000;

impl Range {
    pub(super) fn value(start: i64, stop: i64, step: i64) -> Result {
        if step == 0 {
            return Err(error("the step of a range must not be zero"));
        }
        let distance = match step > 0 {
            true => i128::from(stop) - i128::from(start),
            false => i128::from(start) - i128::from(stop),
        };
        let step_size = i128::from(step.unsigned_abs());
        let length = ((distance + step_size - 1).div_euclid(step_size)).max(0);
        if length > MAX_RANGE {
            return Err(error(format!(
                "a range of {length} numbers is longer than {MAX_RANGE}"
            )));
        }
        Ok(Value::from_object(Self {
            start,
            stop,
            step,
            length: usize::try_from(length).unwrap_or(0),
        }))
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = key.as_usize().filter(|at| *at < self.length)?;
        Some(Value::from(self.start + self.step * at as i64))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.length)
    }
}

/// A method that is named and not called.
#[derive(Debug)]
pub(super) struct BoundMethod(pub(super) String);

impl Object for BoundMethod {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, _: &Value) -> Option<Value> {
        Some(Value::UNDEFINED)
    }

    fn call(self: &Arc<Self>, _: &mut State, _: &[Value]) -> Result {
        Err(error(format!(
            "the method `{}` is called away from its value: write `value.{}(...)`",
            self.0, self.0
        )))
    }
}

pub(super) fn type_name(value: &Value) -> Option<&'static str> {
    if let Some(generator) = value.downcast_object_ref::<Generator>() {
        return Some(generator.name);
    }
    if value.downcast_object_ref::<Range>().is_some() {
        return Some("range");
    }
    view_name(value)
}

pub(super) fn view_name(value: &Value) -> Option<&'static str> {
    value.downcast_object_ref::<View>().map(|view| view.name)
}

pub(super) fn range_repr(value: &Value) -> Option<String> {
    let range = value.downcast_object_ref::<Range>()?;
    let Range {
        start, stop, step, ..
    } = range;
    Some(match step {
        1 => format!("range({start}, {stop})"),
        _ => format!("range({start}, {stop}, {step})"),
    })
}

/// What `groupby` gives: a pair with names.
#[derive(Debug)]
pub(super) struct Group([Value; 2]);

impl Group {
    pub(super) fn value(grouper: Value, items: Vec<Value>) -> Value {
        Value::from_object(Self([grouper, Value::from(items)]))
    }
}

impl Object for Group {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str() {
            Some("grouper") => Some(self.0[0].clone()),
            Some("list") => Some(self.0[1].clone()),
            _ => self.0.get(key.as_usize()?).cloned(),
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(2)
    }
}

pub(super) fn is_group(value: &Value) -> bool {
    value.downcast_object_ref::<Group>().is_some()
}

pub(super) fn is_macro(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|object| object.type_name().contains("Macro"))
}

/// Iterables of ours that are no list.
pub(in super::super) fn is_plain_iterable(value: &Value) -> bool {
    type_name(value).is_some()
}

/// A value that has no text, in words.
pub(super) fn describe(value: &Value) -> String {
    if let Some(method) = value.downcast_object_ref::<BoundMethod>() {
        return format!("the method `{}`, which is not called,", method.0);
    }
    let name = value.as_object().map_or("", |object| object.type_name());
    for (part, words) in [
        ("Namespace", "a namespace"),
        ("Loop", "a loop"),
        ("Macro", "a macro"),
    ] {
        if name.contains(part) {
            return words.into();
        }
    }
    "a function".into()
}
