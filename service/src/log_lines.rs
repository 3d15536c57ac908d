//! The log as one JSON object in each line, for programs.
//!
//! A span's fields are made text once and copied into each of its lines. The format that comes with
//! `tracing-subscriber` reads them again for every line, and for every field that is added.

use std::fmt::{self, Debug};
use std::io;

use serde::{Serialize, Serializer};
use tracing::field::{Field, Visit};
use tracing::span::Record;
use tracing::{Event, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Fields as the inside of a JSON object: `"name":value,"name":value`.
pub struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut members = Members::after(writer, true);
        fields.record(&mut members);
        members.result
    }

    fn add_fields(
        &self,
        current: &'writer mut FormattedFields<Self>,
        fields: &Record<'_>,
    ) -> fmt::Result {
        let is_first = current.fields.is_empty();
        let mut members = Members::after(current.as_writer(), is_first);
        fields.record(&mut members);
        members.result
    }
}

/// Lines such as `{"timestamp":…,"level":"INFO","target":…,"message":…,"span":{"name":…}}`: the
/// event's own fields beside the first three, and the innermost span's in `span`.
pub struct Lines;

impl<S> FormatEvent<S, Fields> for Lines
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, Fields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // What comes from the `log` crate has where it comes from in its fields.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        writer.write_str("{\"timestamp\":\"")?;
        SystemTime.format_time(&mut writer)?;
        write!(writer, "\",\"level\":\"{}\",\"target\":", metadata.level())?;
        json(&mut writer, metadata.target())?;
        let mut members = Members::after(writer.by_ref(), false);
        event.record(&mut members);
        members.result?;
        if let Some(span) = context.lookup_current() {
            writer.write_str(",\"span\":{\"name\":")?;
            json(&mut writer, span.name())?;
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<Fields>>()
                && !fields.is_empty()
            {
                write!(writer, ",{fields}")?;
            }
            writer.write_char('}')?;
        }
        writer.write_str("}\n")
    }
}

/// Writes fields one after another, with commas between them.
struct Members<'writer> {
    writer: Writer<'writer>,
    is_first: bool,
    result: fmt::Result,
}

impl<'writer> Members<'writer> {
    fn after(writer: Writer<'writer>, is_first: bool) -> Self {
        Self {
            writer,
            is_first,
            result: Ok(()),
        }
    }

    fn put(&mut self, field: &Field, value: &(impl Serialize + ?Sized)) {
        if self.result.is_ok() && !field.name().starts_with("log.") {
            self.result = self.write(field.name(), value);
        }
    }

    fn write(&mut self, name: &str, value: &(impl Serialize + ?Sized)) -> fmt::Result {
        if !std::mem::take(&mut self.is_first) {
            self.writer.write_char(',')?;
        }
        json(&mut self.writer, name)?;
        self.writer.write_char(':')?;
        json(&mut self.writer, value)
    }
}

impl Visit for Members<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, &Text(value));
    }
}

/// What a value looks like, as a string.
struct Text<'value>(&'value dyn Debug);

impl Serialize for Text<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:?}", self.0))
    }
}

fn json(writer: &mut Writer<'_>, value: &(impl Serialize + ?Sized)) -> fmt::Result {
    serde_json::to_writer(Bytes(writer), value).map_err(|_| fmt::Error)
}

/// Takes the bytes of JSON, which are text.
struct Bytes<'to, 'writer>(&'to mut Writer<'writer>);

impl io::Write for Bytes<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = str::from_utf8(bytes).map_err(io::Error::other)?;
        self.0.write_str(text).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};
    use tracing::field::Empty;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_line_is_an_object_whatever_it_says() {
        let log = Log::default();
        let to = log.clone();
        let layer = tracing_subscriber::fmt::layer()
            .fmt_fields(Fields)
            .event_format(Lines)
            .with_writer(move || to.clone());
        let subscriber = tracing_subscriber::registry().with(layer);
        let odd = "\"quoted\"\n\u{1}\\ ü";
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(target: "bare", odd, infinite = f64::INFINITY);
            tracing::info_span!("empty", late = Empty).in_scope(|| tracing::info!("no fields"));
            let span = tracing::info_span!("request", odd, late = Empty, later = Empty);
            span.record("late", 7);
            span.record("later", tracing::field::debug("x"));
            let _inside = span.enter();
            tracing::info!(yes = true, half = 0.5, below = -1, path = %odd, "said {}", odd);
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .map(|mut line: Value| {
                let at = line.as_object_mut().unwrap().remove("timestamp").unwrap();
                at.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
                line
            })
            .collect();
        let target = module_path!();
        let wanted = json!([
            { "level": "WARN", "target": "bare", "odd": odd, "infinite": null },
            { "level": "INFO", "target": target, "message": "no fields", "span": { "name": "empty" } },
            {
                "level": "INFO", "target": target, "message": format!("said {odd}"), "yes": true,
                "half": 0.5, "below": -1, "path": odd,
                "span": { "name": "request", "odd": odd, "late": 7, "later": "\"x\"" },
            },
        ]);
        assert_eq!(Value::from(lines), wanted);
    }
}
