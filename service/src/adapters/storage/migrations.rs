//! The migrations, compiled in.
//!
//! `sqlx::migrate!` does that, too, and `derive(FromRow)` what `rows.rs` does; but with sqlx's macros
//! both drivers, SQLite and TLS are built once more, for the machine that compiles.

use futures_util::future::{BoxFuture, ready};
use sqlx::error::BoxDynError;
use sqlx::migrate::{MigrateError, Migration, MigrationSource, MigrationType, Migrator};

/// What brings a database's schema up to date: names and SQL, numbered from 1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Migrations(&'static [(&'static str, &'static str)]);

macro_rules! files {
    ($($name:literal),+ $(,)?) => {
        pub(super) const POSTGRES: Migrations = Migrations(&[$((
            $name,
            include_str!(concat!("../../../migrations/postgres/", $name, ".sql")),
        )),+]);
        pub(super) const SQLITE: Migrations = Migrations(&[$((
            $name,
            include_str!(concat!("../../../migrations/sqlite/", $name, ".sql")),
        )),+]);
    };
}

// One line here is one file for each database: a release has one schema version, whichever it finds.
files![
    "0001_orders",
    "0002_events",
    "0003_audit",
    "0004_fences",
    "0005_contacts",
    "0006_forgetting",
    "0007_audit_at_once",
];

impl Migrations {
    /// The version that this program needs.
    pub(super) fn newest(self) -> i64 {
        self.iter().map(|(version, ..)| version).max().unwrap_or(0)
    }

    /// A database that has newer ones is fine: they only ever add what the release before can live
    /// with, and that release must start after a rollback.
    pub(super) async fn migrator(self) -> Result<Migrator, MigrateError> {
        let mut migrator = Migrator::new(self).await?;
        migrator.set_ignore_missing(true);
        Ok(migrator)
    }

    fn iter(self) -> impl Iterator<Item = (i64, &'static str, &'static str)> {
        (1..)
            .zip(self.0)
            .map(|(version, (name, sql))| (version, *name, *sql))
    }
}

impl MigrationSource<'static> for Migrations {
    fn resolve(self) -> BoxFuture<'static, Result<Vec<Migration>, BoxDynError>> {
        let migration = |(version, name, sql): (i64, &'static str, &'static str)| {
            let description = name.trim_start_matches(|c: char| c.is_ascii_digit() || c == '_');
            let description = description.replace('_', " ").into();
            Migration::new(
                version,
                description,
                MigrationType::Simple,
                sql.into(),
                false,
            )
        };
        Box::pin(ready(Ok(self.iter().map(migration).collect())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The release before must live with what a migration leaves: it runs beside the next one, and again
    /// after a rollback.
    #[test]
    fn migrations_only_add() {
        for (version, name, sql) in POSTGRES.iter().chain(SQLITE.iter()) {
            let lines = sql
                .lines()
                .map(|line| line.split("--").next().unwrap_or(""));
            let sql = lines.collect::<Vec<_>>().join(" ").to_uppercase();
            for statement in sql.split(';') {
                let words: Vec<&str> = statement.split_whitespace().collect();
                let begins = |with: &[&str]| words.starts_with(with);
                let has = |phrase: &[&str]| words.windows(phrase.len()).any(|w| w == phrase);
                let takes_away = begins(&["DROP"])
                    || begins(&["DELETE"])
                    || (begins(&["ALTER", "TABLE"])
                        && (has(&["DROP"])
                            || has(&["RENAME"])
                            || has(&["TYPE"])
                            || has(&["SET", "NOT"])));
                let demands =
                    has(&["ADD", "COLUMN"]) && has(&["NOT", "NULL"]) && !has(&["DEFAULT"]);
                assert!(!takes_away && !demands, "{version} {name}: {statement}");
            }
        }
    }

    #[test]
    fn every_file_is_compiled_in_under_its_number() {
        for (database, migrations) in [("postgres", POSTGRES), ("sqlite", SQLITE)] {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");
            let files = std::fs::read_dir(format!("{folder}/{database}")).unwrap();
            let mut files: Vec<_> = files
                .map(|file| file.unwrap().file_name().into_string().unwrap())
                .collect();
            files.sort();
            let names: Vec<_> = migrations
                .iter()
                .map(|(version, name, _)| {
                    assert!(name.starts_with(&format!("{version:04}_")), "{name}");
                    format!("{name}.sql")
                })
                .collect();
            assert_eq!(
                files, names,
                "migrations/{database}, and what is compiled in"
            );
        }
    }
}
