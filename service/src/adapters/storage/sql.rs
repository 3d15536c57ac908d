//! What both SQL adapters do alike, which is nearly all: written once, for each adapter's own types.
//!
//! The module that calls the macro has the adapter with the fields `pools` and `keyring`, its `begin` (a
//! transaction that may write), its `turn` (for one statement that writes), `stuck_for` (how long nothing
//! has moved, where that is too long), its `NOW` and `MIGRATIONS`, and whatever is said for many at once
//! in its own way: `insert` (an order, its lines and its event), `insert_one` (the same, where that is
//! all), `find_one` (an order), `remove` (events from the outbox), `totals_among` (customers),
//! `note_done` (a consumer's events; those that are new), `count` and `count_no_more` (orders in the
//! totals; those that change), `append` (entries to the audit log) and `no_longer_wait` (for it). A
//! generic function would need every bound of every query instead.

macro_rules! storage_in_sql {
    ($adapter:ty, $database:ty) => {
        impl $adapter {
            /// One statement, and nothing else; how many rows it was about.
            async fn write<'a>(
                &self,
                statement: sqlx::query::Query<
                    'a,
                    $database,
                    <$database as sqlx::Database>::Arguments<'a>,
                >,
            ) -> Result<u64, StorageError> {
                watched(async {
                    let _turn = self.turn().await?;
                    let written = statement.execute(&self.pools.shared()).await?;
                    Ok(written.rows_affected())
                })
                .await
            }

            /// Nobody with an older token writes from now on; whoever's is older does not.
            async fn pass(
                tx: &mut <$database as sqlx::Database>::Connection,
                fence: Fence,
            ) -> Result<(), StorageError> {
                let pass = sqlx::query(rows::FENCE).bind(fence.name).bind(fence.token);
                match pass.execute(&mut *tx).await?.rows_affected() {
                    0 => Err(StorageError::Fenced(fence.name)),
                    _ => Ok(()),
                }
            }
        }

        #[async_trait]
        impl Storage for $adapter {
            async fn place(
                &self,
                order: &Order,
                event: &Event,
                once: Option<&Once>,
            ) -> Result<Placed, StorageError> {
                let contact = contacts::encrypted(self.keyring.as_ref(), order)?;
                let placement = Placement {
                    order: order.clone(),
                    contact,
                    event: rows::to_text(event)?,
                };
                watched(async {
                    let Some(once) = once else {
                        self.insert_one(placement).await?;
                        return Ok(Placed::New);
                    };
                    let mut tx = self.begin().await?;
                    let claim = sqlx::query(rows::CLAIM_KEY)
                        .bind(&once.client)
                        .bind(&once.key);
                    let claim = claim.bind(&once.fingerprint[..]).bind(order.id.as_uuid());
                    let claim = claim.bind(order.created_at.as_millisecond());
                    if claim.execute(&mut *tx).await?.rows_affected() == 0 {
                        let taken = sqlx::query_as(rows::KEY).bind(&once.client).bind(&once.key);
                        let (fingerprint, id): (Vec<u8>, Uuid) = taken.fetch_one(&mut *tx).await?;
                        drop(tx);
                        if fingerprint != once.fingerprint {
                            return Ok(Placed::KeyTaken);
                        }
                        let before = self.find(OrderId::from(id)).await?;
                        let lost = || StorageError::Failed("a key's order is gone".to_owned());
                        return before.map(Placed::Before).ok_or_else(lost);
                    }
                    Self::insert(&mut tx, &placement).await?;
                    failpoint::reached("place-before-commit");
                    tx.commit().await?;
                    failpoint::reached("place-after-commit");
                    Ok(Placed::New)
                })
                .await
            }

            async fn find(&self, id: OrderId) -> Result<Option<Order>, StorageError> {
                self.find_one(id).await
            }

            async fn list(
                &self,
                after: Option<OrderId>,
                limit: u32,
            ) -> Result<Vec<Order>, StorageError> {
                let select = rows::select(if after.is_some() {
                    rows::OLDER
                } else {
                    rows::NEWEST
                });
                let pool = self.pools.shared();
                let lines = || {
                    let query = sqlx::query_as(&select).bind(i64::from(limit));
                    let query = match after {
                        Some(after) => query.bind(after.as_uuid()),
                        None => query,
                    };
                    query.fetch_all(&pool)
                };
                rows::orders(self.pools.retried(lines).await?, self.keyring.as_ref())
            }

            async fn cancel(
                &self,
                id: OrderId,
                now: Timestamp,
                cause: Cause,
            ) -> Result<Option<Order>, StorageError> {
                watched(async {
                    let mut tx = self.begin().await?;
                    let cancel = sqlx::query(rows::CANCEL)
                        .bind(now.as_millisecond())
                        .bind(id.as_uuid());
                    let is_changed = cancel.execute(&mut *tx).await?.rows_affected() == 1;
                    let select = rows::select("WHERE id = $1");
                    let lines = sqlx::query_as(&select).bind(id.as_uuid());
                    let lines = lines.fetch_all(&mut *tx).await?;
                    let order = rows::orders(lines, self.keyring.as_ref())?.pop();
                    if let Some(order) = order.as_ref().filter(|_| is_changed) {
                        let event = Event::new(Kind::Cancelled, order);
                        let event = event.caused_by(cause);
                        let tell = sqlx::query(rows::TELL).bind(rows::to_text(&event)?);
                        tell.bind(Timestamp::now().as_millisecond())
                            .execute(&mut *tx)
                            .await?;
                    }
                    tx.commit().await?;
                    Ok(order)
                })
                .await
            }

            async fn encrypt_anew(
                &self,
                after: OrderId,
                limit: u32,
            ) -> Result<Option<(OrderId, usize)>, StorageError> {
                watched(async {
                    let mut tx = self.begin().await?;
                    let contacts = sqlx::query_as(contacts::AFTER).bind(after.as_uuid());
                    let contacts = contacts.bind(i64::from(limit));
                    let contacts: Vec<(Uuid, Vec<u8>)> = contacts.fetch_all(&mut *tx).await?;
                    let mut changed = 0;
                    for (id, before) in &contacts {
                        let anew = contacts::anew(self.keyring.as_ref(), *id, before)?;
                        if let Some(anew) = anew {
                            let change = sqlx::query(contacts::CHANGE).bind(anew).bind(id);
                            let done = change.bind(before).execute(&mut *tx).await?;
                            changed += usize::try_from(done.rows_affected()).unwrap_or(0);
                        }
                    }
                    tx.commit().await?;
                    let last = contacts.last().map(|(id, _)| OrderId::from(*id));
                    Ok(last.map(|last| (last, changed)))
                })
                .await
            }

            async fn totals(&self, customer: &str) -> Result<Vec<Total>, StorageError> {
                let pool = self.pools.shared();
                let totals = || sqlx::query_as(rows::TOTALS).bind(customer).fetch_all(&pool);
                self.pools.retried(totals).await
            }

            async fn totals_of(
                &self,
                customers: &[String],
            ) -> Result<Vec<(String, Total)>, StorageError> {
                let totals = self.totals_among(customers).await?;
                Ok(totals.into_iter().map(rows::total_of).collect())
            }

            async fn lease(
                &self,
                name: &str,
                owner: &str,
                time: Duration,
            ) -> Result<Option<i64>, StorageError> {
                let milliseconds = i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
                let lease = rows::lease(NOW);
                let lease = sqlx::query_scalar(&lease).bind(name).bind(owner);
                let lease = lease.bind(milliseconds);
                watched(async {
                    let _turn = self.turn().await?;
                    // All of what it answers: only then is it written.
                    let token = lease.fetch_all(&self.pools.shared()).await?;
                    Ok(token.into_iter().next())
                })
                .await
            }

            async fn give_up(&self, name: &str, owner: &str) -> Result<(), StorageError> {
                let give_up = sqlx::query(rows::GIVE_UP).bind(name).bind(owner);
                self.write(give_up).await.map(drop)
            }

            async fn newest_token(&self, name: &str) -> Result<i64, StorageError> {
                let newest = sqlx::query_scalar(rows::NEWEST_TOKEN).bind(name);
                Ok(watched(newest.fetch_one(&self.pools.shared())).await?)
            }

            async fn untold(&self, limit: u32) -> Result<Vec<Untold>, StorageError> {
                let untold = sqlx::query_as(rows::UNTOLD).bind(i64::from(limit));
                Ok(watched(untold.fetch_all(&self.pools.shared())).await?)
            }

            async fn backlog(&self) -> Result<Backlog, StorageError> {
                let backlog = sqlx::query_as(rows::BACKLOG).bind(Backlog::MOST);
                Ok(watched(backlog.fetch_one(&self.pools.shared())).await?)
            }

            async fn forget(&self, days: i64) -> Result<(), StorageError> {
                let before = rows::days_ago(days);
                for forget in rows::FORGET {
                    loop {
                        let some = sqlx::query(forget).bind(before);
                        let some = some.bind(rows::FORGOTTEN_AT_ONCE);
                        if self.write(some).await? < rows::FORGOTTEN_AT_ONCE as u64 {
                            break;
                        }
                    }
                }
                Ok(())
            }

            async fn consume(
                &self,
                consumer: &str,
                events: &[(Uuid, Change)],
            ) -> Result<Vec<bool>, StorageError> {
                watched(async {
                    let mut tx = self.begin().await?;
                    let ids: Vec<Uuid> = events.iter().map(|(id, _)| *id).collect();
                    let mut new: HashSet<Uuid> = Self::note_done(&mut tx, consumer, &ids).await?;
                    let is_new: Vec<bool> = ids.iter().map(|id| new.remove(id)).collect();
                    let changes = || {
                        let events = events.iter().zip(&is_new);
                        events.filter_map(|((_, change), is_new)| is_new.then_some(change))
                    };
                    let [more, fewer] = rows::counted(changes());
                    let mut counted = [HashSet::new(), HashSet::new()];
                    if !more.is_empty() {
                        counted[0] = Self::count(&mut tx, &more).await?;
                    }
                    if !fewer.is_empty() {
                        counted[1] = Self::count_no_more(&mut tx, &fewer).await?;
                    }
                    for ((customer, currency), (orders, cents)) in
                        rows::sums(changes(), &mut counted)
                    {
                        for add in rows::ADD_TO_TOTALS {
                            let add = sqlx::query(add).bind(customer).bind(currency);
                            let add = add.bind(orders).bind(cents);
                            if add.execute(&mut *tx).await?.rows_affected() == 1 {
                                break;
                            }
                        }
                    }
                    failpoint::reached("consume-before-commit");
                    tx.commit().await?;
                    failpoint::reached("consume-after-commit");
                    Ok(is_new)
                })
                .await
            }

            async fn audit(&self, limit: u32, fence: Fence) -> Result<usize, StorageError> {
                watched(async {
                    let first = sqlx::query_as(rows::WAITING_FOR_AUDIT).bind(1i64);
                    let first: Option<Untold> = first.fetch_optional(&self.pools.shared()).await?;
                    if first.is_none() {
                        return Ok(0);
                    }
                    let mut tx = self.begin().await?;
                    Self::pass(&mut tx, fence).await?;
                    let waiting = sqlx::query_as(rows::WAITING_FOR_AUDIT).bind(i64::from(limit));
                    let waiting: Vec<Untold> = waiting.fetch_all(&mut *tx).await?;
                    let last = sqlx::query_as(rows::LAST_AUDITED);
                    let last: Option<Entry> = last.fetch_optional(&mut *tx).await?;
                    let (mut seq, mut before) = last.map_or((0, Vec::new()), |e| (e.seq, e.hash));
                    let entries = waiting.iter().map(|Untold { event, .. }| {
                        seq += 1;
                        before = audit::hash(&before, seq, event);
                        Entry {
                            seq,
                            event: event.clone(),
                            hash: before.clone(),
                        }
                    });
                    let entries: Vec<Entry> = entries.collect();
                    // Another process is at it, too: what it has done is not done again.
                    if Self::append(&mut tx, &entries).await? < entries.len() as u64 {
                        return Err(StorageError::Busy("the audit log has grown".to_owned()));
                    }
                    let places: Vec<i64> = waiting.iter().map(|waiting| waiting.seq).collect();
                    Self::no_longer_wait(&mut tx, &places).await?;
                    failpoint::reached("audit-before-commit");
                    tx.commit().await?;
                    Ok(waiting.len())
                })
                .await
            }

            async fn audited(&self, after: i64, limit: u32) -> Result<Vec<Entry>, StorageError> {
                let entries = sqlx::query_as(rows::AUDITED).bind(after);
                let entries = entries.bind(i64::from(limit));
                Ok(watched(entries.fetch_all(&self.pools.shared())).await?)
            }

            async fn bury(
                &self,
                consumer: &str,
                id: Uuid,
                event: &str,
                error: &str,
            ) -> Result<(), StorageError> {
                let bury = sqlx::query(rows::BURY).bind(consumer).bind(id);
                let bury = bury.bind(event).bind(error);
                let bury = bury.bind(Timestamp::now().as_millisecond());
                self.write(bury).await.map(drop)
            }

            async fn is_buried(&self, consumer: &str, event: Uuid) -> Result<bool, StorageError> {
                let buried = sqlx::query_scalar::<_, i64>(rows::IS_BURIED);
                let buried = buried.bind(consumer).bind(event);
                Ok(watched(buried.fetch_one(&self.pools.shared())).await? > 0)
            }

            async fn buried(&self, limit: u32) -> Result<Vec<DeadLetter>, StorageError> {
                let buried = sqlx::query_as(rows::BURIED).bind(i64::from(limit));
                Ok(watched(buried.fetch_all(&self.pools.shared())).await?)
            }

            async fn unbury(&self, consumer: &str, event: Uuid) -> Result<(), StorageError> {
                let unbury = sqlx::query(rows::UNBURY).bind(consumer).bind(event);
                self.write(unbury).await.map(drop)
            }

            async fn told(&self, events: &[i64], fence: Fence) -> Result<(), StorageError> {
                watched(async {
                    let mut tx = self.begin().await?;
                    Self::pass(&mut tx, fence).await?;
                    Self::remove(&mut tx, events).await?;
                    tx.commit().await?;
                    Ok(())
                })
                .await
            }

            async fn check(&self) -> Result<(), StorageError> {
                if let Some(long) = self.stuck_for() {
                    let why = format!("nothing has been done for {long:.0?}");
                    return Err(StorageError::Busy(why));
                }
                let version = sqlx::query_scalar(rows::SCHEMA_VERSION);
                let version = watched(version.fetch_one(&self.pools.probe())).await?;
                rows::judge_schema(version, MIGRATIONS)
            }

            async fn schema_version(&self) -> Result<i64, StorageError> {
                let version = sqlx::query_scalar(rows::SCHEMA_VERSION);
                Ok(watched(version.fetch_one(&self.pools.shared())).await?)
            }

            fn connections(&self) -> Connections {
                self.pools.connections()
            }

            async fn close(&self) {
                self.pools.close().await;
            }
        }
    };
}
pub(super) use storage_in_sql;
