//! How many events the brokers take and give, by the service's own adapters.
//!
//! `cargo xtask servers run -- cargo bench --package service --bench bus` publishes batches of the size
//! that ships, one after another, each confirmed before the next, while a consumer says of each event
//! that it is done; prints how many of both there were in a second, and fails where a median is below
//! what is wanted of the service.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on fails")]
#![expect(clippy::print_stdout, reason = "its result is what it prints")]

#[expect(dead_code, reason = "some of it is for tests only")]
#[path = "../../tests/integration/broker.rs"]
mod broker;
#[path = "../bare/judged.rs"]
mod judged;

use std::path::Path;
use std::time::{Duration, Instant};

use broker::Broker;
use judged::{judged, median};
use service::adapters::bus::{self, Bus, Subscription};
use service::config::Config;
use service::domain::events::{Event, Kind};
use service::domain::orders::{ItemRequest, Order, OrderRequest};

const ROUNDS: usize = 3;
const EVENTS: usize = 50_000;
/// Events a second, confirmed as well as acknowledged.
const AT_LEAST: f64 = 10_000.0;
/// What has not come by then is lost.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let all = runtime.block_on(async {
        println!("{:12}{:>16}{:>16}", "", "confirmed/s", "acknowledged/s");
        let mut all = true;
        for broker in [Broker::rabbitmq().await, Broker::kafka().await] {
            all &= measure(&broker).await;
        }
        all
    });
    if !all {
        std::process::exit(1);
    }
}

/// Whether all is as is wanted.
async fn measure(broker: &Broker) -> bool {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/service/default.toml");
    let mut config = Config::from_files(&[file]).unwrap();
    broker.use_in(&mut config);
    let bus = bus::open(&config);
    let batch = usize::try_from(config.events.batch.get()).unwrap();
    // A queue that nobody empties would be work for the broker, too.
    let mut subscription = bus.subscribe("totals").await.unwrap();
    let kind = broker.kind;
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let events: Vec<Event> = (0..EVENTS).map(|_| event()).collect();
        let began = Instant::now();
        let publish = async {
            for batch in events.chunks(batch) {
                publish(&*bus, batch).await;
            }
            began.elapsed()
        };
        let consume = async {
            consume(&mut *subscription, batch).await;
            began.elapsed()
        };
        let both = async { tokio::join!(publish, consume) };
        let (published, consumed) = tokio::time::timeout(PATIENCE, both).await.unwrap();
        let [published, consumed] = [published, consumed].map(|t| EVENTS as f64 / t.as_secs_f64());
        println!("{kind:12}{published:>16.0}{consumed:>16.0}");
        rates[0].push(published);
        rates[1].push(consumed);
    }
    let [published, consumed] = rates.map(median);
    let medians = format!("{kind:12}{published:>16.0}{consumed:>16.0} (at least {AT_LEAST})");
    judged(&medians, published.min(consumed) >= AT_LEAST)
}

/// As the relay does: again, until nothing is lost any more.
async fn publish(bus: &dyn Bus, events: &[Event]) {
    while bus.publish(events).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Until all are done; what comes again is done again.
async fn consume(subscription: &mut dyn Subscription, batch: usize) {
    let mut done = 0;
    while done < EVENTS {
        let first = subscription.next().await.unwrap();
        let mut deliveries = vec![first];
        deliveries.extend(subscription.ready(batch - 1));
        done += deliveries.len();
        bus::done(deliveries).await.unwrap();
    }
}

fn event() -> Event {
    let item = |sku: &str| ItemRequest {
        sku: sku.to_owned(),
        quantity: 2,
        unit_price_cents: 450,
    };
    let request = OrderRequest {
        customer: "bench".to_owned(),
        currency: "EUR".to_owned(),
        items: vec![item("tea"), item("cup")],
        contact: None,
    };
    Event::new(Kind::Placed, &Order::place(request, 50).unwrap())
}
