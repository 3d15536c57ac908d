//! Orders over GraphQL: queries, mutations and, over a WebSocket, a subscription.
//! <https://spec.graphql.org/>, <https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md>

use std::collections::HashMap;
use std::sync::Arc;

use async_graphql::dataloader::{DataLoader, Loader};
use async_graphql::extensions::{Extension, ExtensionContext, ExtensionFactory, NextParseQuery};
use async_graphql::parser::types::{ExecutableDocument, Selection, SelectionSet};
use async_graphql::{
    ComplexObject, Context, Data, Enum, ErrorExtensions, InputObject, Object, Schema, ServerError,
    ServerResult, SimpleObject, Subscription, Variables, scalar,
};
use async_graphql_axum::{GraphQLProtocol, GraphQLRequest, GraphQLResponse, GraphQLWebSocket};
use axum::extract::ws::{CloseFrame, Message, WebSocketUpgrade, close_code};
use axum::extract::{Extension as Shared, State};
use axum::response::{IntoResponse, Response};
use futures_util::{SinkExt, Stream, StreamExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fault::Fault;
use super::problem::{Problem, idempotency_key, order_id};
use crate::app::{App, Error};
use crate::auth::{Caller, Operation};
use crate::domain::events;
use crate::domain::orders::{self, OrderRequest, PageRequest};

pub type Orders = Schema<Query, Mutation, Changes>;
type Answer<T> = async_graphql::Result<T>;

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
    request: Result<GraphQLRequest, async_graphql_axum::rejection::GraphQLRejection>,
) -> Result<GraphQLResponse, Problem> {
    let request = request.map_err(|async_graphql_axum::rejection::GraphQLRejection(error)| {
        Problem::new(Fault::Unreadable).detail(error.to_string())
    })?;
    let response = schema.execute(request.into_inner().data(caller)).await;
    let outcome = if response.is_ok() { "ok" } else { "error" };
    metrics::counter!("graphql_requests_total", "outcome" => outcome).increment(1);
    Ok(response.into())
}

/// `GET /graphql/schema`: in the schema definition language.
pub async fn definition(Shared(schema): Shared<Orders>) -> String {
    schema.sdl()
}

/// `GET /graphql`: subscriptions over a WebSocket.
pub async fn subscribe(
    State(app): State<Arc<App>>,
    Shared(schema): Shared<Orders>,
    Shared(caller): Shared<Caller>,
    protocol: GraphQLProtocol,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Problem> {
    let session = app.sessions.begin().ok_or(Error::Full)?;
    let heartbeat = app.config.server.heartbeat.0;
    let limit = app.config.server.body_limit.get();
    let upgrade = upgrade
        .protocols(async_graphql::http::ALL_WEBSOCKET_PROTOCOLS)
        .max_message_size(limit)
        .max_frame_size(limit);
    Ok(upgrade
        .on_upgrade(async move |socket| {
            let (mut sink, stream) = socket.split();
            let stream = stream.take_until(session.ending());
            GraphQLWebSocket::new_with_pair(&mut sink, Box::pin(stream), schema, protocol)
                .on_connection_init(async move |greeting| recognised(&app, caller, &greeting).await)
                .keepalive_timeout(2 * heartbeat)
                .serve()
                .await;
            let reason = "the service is stopping".into();
            let code = close_code::AWAY;
            let close = Message::Close(Some(CloseFrame { code, reason }));
            let _ = tokio::time::timeout(heartbeat, sink.send(close)).await;
        })
        .into_response())
}

/// Who has connected. Browsers cannot send a token with a WebSocket's request, so it may come with its
/// first message: `{"authorization": "Bearer TOKEN"}`.
async fn recognised(app: &App, caller: Caller, greeting: &Value) -> Answer<Data> {
    let caller = match greeting.get("authorization") {
        Some(field) => app.auth.bearer(field.as_str().unwrap_or_default()).await?,
        None => caller,
    };
    let mut data = Data::default();
    data.insert(caller);
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
    items: Vec<Item>,
    total_cents: Long,
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
        let message = problem.detail.unwrap_or_else(|| problem.title.to_owned());
        Self::new(message).extend_with(|_, extensions| {
            let code = problem.kind.replace('-', "_").to_uppercase();
            extensions.set("code", code);
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

/// Refuses a document with too many fields: depth and complexity say nothing of a thousand aliases
/// that ask for the same thing, and fragments multiply what is written.
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
    async fn parse_query(
        &self,
        context: &ExtensionContext<'_>,
        query: &str,
        variables: &Variables,
        next: NextParseQuery<'_>,
    ) -> ServerResult<ExecutableDocument> {
        let document = next.run(context, query, variables).await?;
        let operations = document.operations.iter();
        let operations = operations.map(|(_, operation)| &operation.node.selection_set.node);
        let fragments = document.fragments.values();
        let fragments = fragments.map(|fragment| &fragment.node.selection_set.node);
        let fields: usize = operations.chain(fragments).map(fields).sum();
        if fields > self.fields {
            let limit = self.fields;
            let message = format!("The document has {fields} fields, of at most {limit}");
            return Err(ServerError::new(message, None));
        }
        Ok(document)
    }
}

fn fields(selection: &SelectionSet) -> usize {
    let items = selection.items.iter().map(|item| match &item.node {
        Selection::Field(field) => 1 + fields(&field.node.selection_set.node),
        Selection::FragmentSpread(_) => 1,
        Selection::InlineFragment(fragment) => fields(&fragment.node.selection_set.node),
    });
    items.sum()
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
