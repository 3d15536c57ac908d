//! Orders over GraphQL: queries, mutations and, over a WebSocket, a subscription.
//! <https://spec.graphql.org/>, <https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md>

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_graphql::dataloader::{DataLoader, Loader};
use async_graphql::extensions::{
    Extension, ExtensionContext, ExtensionFactory, NextPrepareRequest,
};
use async_graphql::parser::parse_query;
use async_graphql::parser::types::{ExecutableDocument, OperationType, Selection, SelectionSet};
use async_graphql::{
    ComplexObject, Context, Data, Enum, ErrorExtensions, InputObject, Object, Schema, ServerError,
    ServerResult, SimpleObject, Subscription, scalar,
};
use async_graphql_axum::{GraphQLProtocol, GraphQLResponse, GraphQLWebSocket};
use axum::extract::ws::{Message, close_code};
use axum::extract::{Extension as Shared, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSender;

use super::fault::Fault;
use super::problem::{Problem, idempotency_key, order_id};
use super::rest::Body;
use super::websocket::{Talk, Upgrade};
use crate::app::{App, Error};
use crate::auth::{Caller, Operation};
use crate::domain::events;
use crate::domain::orders::{self, OrderRequest, PageRequest};
use crate::metrics::METRICS;

pub type Orders = Schema<Query, Mutation, Changes>;
type Answer<T> = async_graphql::Result<T>;

/// Messages of a WebSocket that may wait, either way.
const WAITING: usize = 64;
/// How long a client may take to say that it has come, and the code that says so.
const GREETING: Duration = Duration::from_secs(10);
const NOT_GREETED: u16 = 4408;

pub fn schema(app: &Arc<App>) -> Orders {
    let limits = &app.config.graphql;
    let schema = Schema::build(Query, Mutation, Changes)
        .data(Arc::clone(app))
        // It keeps nothing: only what is asked for at the same time is loaded together.
        .data(DataLoader::new(TotalsLoader(Arc::clone(app)), tokio::spawn))
        .limit_depth(limits.max_depth.get())
        .limit_complexity(limits.max_complexity.get())
        .extension(Frugal {
            fields: limits.max_fields.get(),
        });
    let schema = match limits.introspection {
        true => schema,
        false => schema.disable_introspection(),
    };
    schema.finish()
}

/// `POST /graphql`
pub async fn execute(
    Shared(schema): Shared<Orders>,
    Shared(caller): Shared<Caller>,
    Body(request): Body<async_graphql::Request>,
) -> Response {
    let response = schema.execute(request.data(caller)).await;
    let outcome = if response.is_ok() { "ok" } else { "error" };
    METRICS
        .graphql_requests
        .get_or_create(&[("outcome", outcome)])
        .inc();
    let faults = response.errors.iter().filter_map(ServerError::source);
    let worst = faults.map(|fault: &Fault| fault.names().http).max();
    let mut answer = GraphQLResponse::from(response).into_response();
    if let Some(failed) = worst.filter(StatusCode::is_server_error) {
        answer.extensions_mut().insert(Failed(failed));
    }
    answer
}

/// That the service could not do what a request asked for.
#[derive(Clone, Copy)]
struct Failed(StatusCode);

/// An answer's status in the words of HTTP, by which all interfaces are counted: GraphQL's own says 200 of what
/// failed, too.
pub fn status(answer: &Response) -> StatusCode {
    let failed = answer.extensions().get();
    failed.map_or(answer.status(), |Failed(failed)| *failed)
}

/// `GET /graphql/schema`: in the schema definition language, for whom queries tell it, too.
pub async fn definition(
    State(app): State<Arc<App>>,
    Shared(schema): Shared<Orders>,
) -> Result<String, Problem> {
    match app.config.graphql.introspection {
        true => Ok(schema.sdl()),
        false => Err(Problem::new(Fault::NotFound)),
    }
}

/// `GET /graphql`: subscriptions over a WebSocket, and nothing else: what is asked there passes no
/// limit of requests.
pub async fn subscribe(
    State(app): State<Arc<App>>,
    Shared(schema): Shared<Orders>,
    Shared(caller): Shared<Caller>,
    protocol: Result<GraphQLProtocol, StatusCode>,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, Problem> {
    let protocol = protocol.map_err(|_| {
        Problem::new(Fault::Unreadable).detail("the protocol must be graphql-transport-ws")
    })?;
    let session = app.sessions.begin(&caller.client).ok_or(Error::Full)?;
    let limit = app.config.server.body_limit.get();
    let upgrade = upgrade
        .protocols(async_graphql::http::ALL_WEBSOCKET_PROTOCOLS)
        .max_message_size(limit)
        .max_frame_size(limit);
    Ok(upgrade
        .on_upgrade(async move |socket| {
            let (to_say, say) = mpsc::channel(WAITING);
            let (hear, heard) = mpsc::channel(WAITING);
            let (greet, greeted) = oneshot::channel();
            let talk = Talk {
                session,
                heartbeat: app.config.server.heartbeat.0,
                at_the_end: (close_code::NORMAL, "there is nothing more to say"),
            };
            let heard = ReceiverStream::new(heard).map(Ok::<_, axum::Error>);
            let served =
                GraphQLWebSocket::new_with_pair(PollSender::new(to_say), heard, schema, protocol)
                    .on_connection_init(async move |greeting| {
                        // Nobody waits for it where that took too long.
                        let _ = greet.send(());
                        recognised(&app, caller, &greeting).await
                    })
                    .serve();
            let hear = move |message| {
                let flooded = |_| (close_code::POLICY, "too many messages at once");
                hear.try_send(message).map_err(flooded)
            };
            let say = ReceiverStream::new(say).map(|message| match message {
                Message::Close(Some(close)) => Err((close.code, "the protocol was not kept to")),
                message => Ok(message),
            });
            // Who has a place without saying anything takes it from others.
            let late = stream::once(timeout(GREETING, greeted)).filter_map(async |greeted| {
                let late = (NOT_GREETED, "connection initialisation timeout");
                greeted.is_err().then_some(Err(late))
            });
            let late = pin!(late);
            let say = stream::select(say, late);
            tokio::select! {
                () = talk.go_on(socket, say, hear) => {}
                // The talk ends when all was said.
                () = async { served.await; std::future::pending().await } => {}
            }
        })
        .into_response())
}

/// On a connection that only subscriptions are for.
struct OnlySubscriptions;

/// Who has connected. Browsers cannot send a token with a WebSocket's request, so it may come with its
/// first message: `{"authorization": "Bearer TOKEN"}`.
async fn recognised(app: &App, caller: Caller, greeting: &Value) -> Answer<Data> {
    let caller = match greeting.get("authorization") {
        Some(field) => app.auth.bearer(field.as_str().unwrap_or_default()).await?,
        None => caller,
    };
    let mut data = Data::default();
    data.insert(caller);
    data.insert(OnlySubscriptions);
    Ok(data)
}

pub struct Query;

#[Object]
impl Query {
    /// An order, or null where there is none.
    async fn order(&self, context: &Context<'_>, id: String) -> Answer<Option<Order>> {
        match app(context)
            .order(caller(context), order_id(&id, "/id")?)
            .await
        {
            Ok(order) => Ok(Some(order.into())),
            Err(Error::NotFound(_)) => Ok(None),
            Err(error) => Err(refused(error)),
        }
    }

    /// The newest orders first.
    #[graphql(complexity = "first.unwrap_or(20).max(1) as usize * child_complexity")]
    async fn orders(
        &self,
        context: &Context<'_>,
        first: Option<u32>,
        after: Option<String>,
    ) -> Answer<Page> {
        let after = after.map(|after| order_id(&after, "/after")).transpose()?;
        let request = PageRequest {
            limit: first,
            after,
        };
        let page = app(context)
            .orders(caller(context), request)
            .await
            .map_err(refused)?;
        Ok(Page {
            items: page.items.into_iter().map(Into::into).collect(),
            next: page.next.map(|id| id.to_string()),
        })
    }

    /// What a customer has ordered and not cancelled; it follows the orders a moment later.
    async fn totals(&self, context: &Context<'_>, customer: String) -> Answer<Vec<Total>> {
        let totals = app(context)
            .totals(caller(context), &customer)
            .await
            .map_err(refused)?;
        Ok(totals.into_iter().map(Into::into).collect())
    }
}

pub struct Mutation;

#[Object]
impl Mutation {
    /// Places an order. With a key the same request again gets the same answer, and places no other.
    async fn place_order(
        &self,
        context: &Context<'_>,
        order: NewOrder,
        idempotency_key: Option<String>,
    ) -> Answer<Order> {
        let key = self::idempotency_key(idempotency_key.as_deref())?;
        let created = app(context)
            .create_order(caller(context), order.into(), key)
            .await;
        Ok(created.map_err(refused)?.order.into())
    }

    /// Cancelling a cancelled order changes nothing and answers with it.
    async fn cancel_order(&self, context: &Context<'_>, id: String) -> Answer<Order> {
        let order = app(context)
            .cancel_order(caller(context), order_id(&id, "/id")?)
            .await;
        Ok(order.map_err(refused)?.into())
    }
}

pub struct Changes;

#[Subscription(name = "Subscription")]
impl Changes {
    /// What happens to orders from now on: of one customer, or all.
    async fn order_events(
        &self,
        context: &Context<'_>,
        customer: Option<String>,
    ) -> async_graphql::Result<impl Stream<Item = Answer<OrderEvent>>> {
        let events = app(context)
            .watch(caller(context), customer)
            .map_err(refused)?;
        Ok(events.map(|event| match event {
            Ok(event) => Ok((&*event).into()),
            Err(error) => Err(refused(error)),
        }))
    }
}

#[derive(Enum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Open,
    Cancelled,
}

#[derive(Debug, SimpleObject)]
#[graphql(complex)]
pub struct Order {
    /// A UUID.
    id: String,
    customer: String,
    /// ISO 4217.
    currency: String,
    status: Status,
    #[graphql(complexity = "50 * child_complexity")]
    items: Vec<Item>,
    total_cents: Long,
    /// How to reach whoever has placed it. Events have none.
    contact: Option<String>,
    /// RFC 3339.
    created_at: String,
    updated_at: String,
}

#[ComplexObject]
impl Order {
    /// What its customer has ordered in all; for all orders of a page at once.
    async fn customer_totals(&self, context: &Context<'_>) -> Answer<Vec<Total>> {
        let may = caller(context).check(Operation::GetTotals);
        may.map_err(refused)?;
        let loader = context.data_unchecked::<DataLoader<TotalsLoader>>();
        let totals = loader.load_one(self.customer.clone()).await?;
        Ok(totals.unwrap_or_default())
    }
}

#[derive(Debug, SimpleObject)]
pub struct Item {
    sku: String,
    quantity: u32,
    unit_price_cents: Long,
}

#[derive(Debug, SimpleObject)]
pub struct Page {
    items: Vec<Order>,
    /// The `after` of the next page, where there is one.
    next: Option<String>,
}

#[derive(Debug, Clone, SimpleObject)]
pub struct Total {
    currency: String,
    orders: Long,
    total_cents: Long,
}

#[derive(Enum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Placed,
    Cancelled,
}

#[derive(Debug, SimpleObject)]
pub struct OrderEvent {
    /// A UUID: whoever has seen it before knows it by this.
    id: String,
    kind: EventKind,
    time: String,
    /// The order as it was right after.
    order: Order,
}

#[derive(Debug, InputObject)]
pub struct NewOrder {
    customer: String,
    currency: String,
    items: Vec<NewItem>,
    contact: Option<String>,
}

#[derive(Debug, InputObject)]
pub struct NewItem {
    sku: String,
    quantity: u32,
    unit_price_cents: Long,
}

/// GraphQL's own Int has 32 bits.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Long(i64);
scalar!(
    Long,
    "Long",
    "A whole number of 64 bits, in the range that JSON is read exactly in"
);

fn app<'a>(context: &Context<'a>) -> &'a Arc<App> {
    context.data_unchecked::<Arc<App>>()
}

fn caller<'a>(context: &Context<'a>) -> &'a Caller {
    context.data_unchecked::<Caller>()
}

fn refused(error: Error) -> async_graphql::Error {
    Problem::from(error).into()
}

impl From<Problem> for async_graphql::Error {
    fn from(problem: Problem) -> Self {
        let error = Self {
            source: Some(Arc::new(problem.fault)),
            ..Self::new(problem.message())
        };
        error.extend_with(|_, extensions| {
            extensions.set("code", problem.code());
            if let Ok(errors) = async_graphql::to_value(&problem.errors)
                && !problem.errors.is_empty()
            {
                extensions.set("errors", errors);
            }
        })
    }
}

/// Loads the totals of all customers that a request asks for, by one query.
struct TotalsLoader(Arc<App>);

impl Loader<String> for TotalsLoader {
    type Value = Vec<Total>;
    type Error = async_graphql::Error;

    async fn load(&self, customers: &[String]) -> Answer<HashMap<String, Vec<Total>>> {
        let totals = self.0.totals_of(customers).await.map_err(refused)?;
        let mut found: HashMap<String, Vec<Total>> = HashMap::new();
        for (customer, total) in totals {
            found.entry(customer).or_default().push(total.into());
        }
        Ok(found)
    }
}

/// Refuses a document that is too large once its fragments are put in, before anything walks it: depth
/// and complexity say nothing of a thousand aliases, and a few fragments that spread each other make
/// more fields than anybody can count.
struct Frugal {
    fields: usize,
}

impl ExtensionFactory for Frugal {
    fn create(&self) -> Arc<dyn Extension> {
        Arc::new(Self {
            fields: self.fields,
        })
    }
}

#[async_trait::async_trait]
impl Extension for Frugal {
    async fn prepare_request(
        &self,
        context: &ExtensionContext<'_>,
        request: async_graphql::Request,
        next: NextPrepareRequest<'_>,
    ) -> ServerResult<async_graphql::Request> {
        let mut request = next.run(context, request).await?;
        let document = parse_query(&request.query)?;
        let fields = Fields::of(&document);
        if fields > self.fields {
            let limit = self.fields;
            let message = format!("The document has more than {limit} fields");
            return Err(ServerError::new(message, None));
        }
        let mut operations = document.operations.iter();
        let others =
            operations.any(|(_, operation)| operation.node.ty != OperationType::Subscription);
        if others && context.data_opt::<OnlySubscriptions>().is_some() {
            let message = "Only subscriptions are for a WebSocket; send the others by POST";
            return Err(ServerError::new(message, None));
        }
        request.set_parsed_query(document);
        Ok(request)
    }
}

/// Counts the fields and fragments of a document, each fragment as often as it is spread.
struct Fields<'a> {
    document: &'a ExecutableDocument,
    /// Of each fragment; nothing yet while it is being counted.
    known: HashMap<&'a str, Option<usize>>,
}

impl<'a> Fields<'a> {
    fn of(document: &'a ExecutableDocument) -> usize {
        let mut count = Self {
            document,
            known: HashMap::new(),
        };
        let operations = document.operations.iter();
        let sets = operations.map(|(_, operation)| &operation.node.selection_set.node);
        let all = sets.fold(0usize, |all, set| all.saturating_add(count.set(set)));
        // Also of those that nothing spreads: they are walked, too.
        let fragments = document.fragments.keys();
        fragments.fold(all, |all, name| all.saturating_add(count.fragment(name)))
    }

    fn set(&mut self, set: &'a SelectionSet) -> usize {
        set.items.iter().fold(0, |all, item| {
            let more = match &item.node {
                Selection::Field(field) => self.set(&field.node.selection_set.node),
                Selection::FragmentSpread(spread) => {
                    self.fragment(spread.node.fragment_name.node.as_str())
                }
                Selection::InlineFragment(inline) => self.set(&inline.node.selection_set.node),
            };
            all.saturating_add(more).saturating_add(1)
        })
    }

    fn fragment(&mut self, name: &str) -> usize {
        let document = self.document;
        let Some((name, fragment)) = document.fragments.get_key_value(name) else {
            return 0;
        };
        match self.known.get(name.as_str()) {
            Some(Some(fields)) => *fields,
            // It spreads itself, which has no end.
            Some(None) => usize::MAX,
            None => {
                self.known.insert(name, None);
                let fields = self.set(&fragment.node.selection_set.node);
                self.known.insert(name, Some(fields));
                fields
            }
        }
    }
}

impl From<NewOrder> for OrderRequest {
    fn from(order: NewOrder) -> Self {
        let items = order.items.into_iter().map(|item| orders::ItemRequest {
            sku: item.sku,
            quantity: item.quantity,
            unit_price_cents: item.unit_price_cents.0,
        });
        Self {
            customer: order.customer,
            currency: order.currency,
            items: items.collect(),
            contact: order.contact.map(orders::Contact),
        }
    }
}

impl From<orders::Order> for Order {
    fn from(order: orders::Order) -> Self {
        let items = order.items.into_iter().map(|item| Item {
            sku: item.sku,
            quantity: item.quantity,
            unit_price_cents: Long(item.unit_price_cents),
        });
        Self {
            id: order.id.to_string(),
            customer: order.customer,
            currency: order.currency,
            status: match order.status {
                orders::Status::Open => Status::Open,
                orders::Status::Cancelled => Status::Cancelled,
            },
            items: items.collect(),
            total_cents: Long(order.total_cents),
            contact: order.contact.map(|contact| contact.0),
            created_at: order.created_at.to_string(),
            updated_at: order.updated_at.to_string(),
        }
    }
}

impl From<orders::Total> for Total {
    fn from(total: orders::Total) -> Self {
        Self {
            currency: total.currency,
            orders: Long(total.orders),
            total_cents: Long(total.total_cents),
        }
    }
}

impl From<&events::Event> for OrderEvent {
    fn from(event: &events::Event) -> Self {
        Self {
            id: event.id.to_string(),
            kind: match event.kind {
                events::Kind::Placed => EventKind::Placed,
                events::Kind::Cancelled => EventKind::Cancelled,
            },
            time: event.time.to_string(),
            order: event.data.clone().into(),
        }
    }
}
