//! Writes the events of `tracing` as lines.

use super::Log;
use super::line::Line;
use std::error::Error;
use std::fmt::{Debug, Write as _};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// The field that holds the message of an event.
const MESSAGE: &str = "message";

/// Writes one line for each event.
pub(super) struct EventLines;

impl<S: Subscriber> Layer<S> for EventLines {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let Some(log) = Log::get() else { return };
        let form = log.form();
        // Formatting a value runs code of other modules. So it happens before the buffer is locked.
        let mut message = Message(String::new());
        event.record(&mut message);
        let mut fields = Vec::new();
        event.record(&mut Fields(Line::fields(&mut fields, form)));
        let metadata = event.metadata();
        log.output.add(|buffer, timestamp| {
            let line = Line::begin(buffer, form, timestamp, *metadata.level(), metadata.target(), &message.0);
            line.append(&fields);
        });
    }
}

/// Takes the message.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == MESSAGE {
            // Writing to a string cannot fail.
            let _ = write!(self.0, "{value:?}");
        }
    }
}

/// Takes all other fields.
struct Fields<'b>(Line<'b>);

impl Fields<'_> {
    fn add(&mut self, field: &Field, value: impl serde::Serialize) {
        if field.name() != MESSAGE {
            self.0.add(field.name(), value);
        }
    }
}

impl Visit for Fields<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.add(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if !value.is_empty() {
            self.add(field, value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.add(field, value.to_string());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() != MESSAGE {
            self.0.add(field.name(), format!("{value:?}"));
        }
    }
}
